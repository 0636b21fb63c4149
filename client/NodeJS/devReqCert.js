'use strict';

// A station's side of the exchange with the certificate server. No dependencies, Node 12 and newer.
//
//   req_dev_cert(ip, pk, id, callback, options)                     asks for a certificate (Action 0)
//   send_burn_result_by_did(ip, pk, id, result, callback, options)  reports a burn (Action 1; 2 where result is false)
//
// ip        'HOST', 'HOST:PORT' or '[IPv6]:PORT'; the port is 8000 unless given
// id        the device's own id; null asks for a new identity, whose reply holds a DeviceID that the server made up
// callback  callback(text, error), called once. Done: text is the reply, error is null. Failed: text is
//           {"Status": CODE, "Message": "..."}, so that a handler that only parses it does not throw; error says it too
// options   { timeout, retries, delay } in milliseconds; see DEFAULTS
//
// Both also return a promise of the text. A program with a callback may ignore it: its rejection is never "unhandled".
// error.code is the server's Status (UnknownProduct, PoolExhausted, ...) or one of: BadRequest (the arguments),
// Unreachable (the request never left), ConnectionLost, Timeout, BadReply (not a reply of the protocol), WrongCRC32.

const dns = require('dns');
const http = require('http');
const net = require('net');

const DEFAULT_PORT = 8000;
const MAX_REPLY = 64 * 1024; // bytes; a reply has about 300
const MAX_OPTION = 0x7fffffff; // a timer of Node runs off at once for more
const DEFAULTS = {
  timeout: 15000, // of the whole call; each attempt gets its share
  retries: 2, // further attempts, where they are safe
  delay: 500, // before the second attempt; doubled before each further one
};

// `again`: another attempt may help. `spent`: this one may have taken a certificate, so without an id it is the last.
class CertError extends Error {
  constructor(code, message, again, spent) {
    super(message);
    this.name = 'CertError';
    this.code = code;
    Object.defineProperties(this, { again: { value: again }, spent: { value: spent } });
  }
}

function badRequest(message) {
  return new CertError('BadRequest', message, false, false);
}

function badReply(message) {
  return new CertError('BadReply', message, true, true);
}

// The IEEE CRC32, a bit a step: reflected polynomial EDB88320, init and xor-out FFFFFFFF.
function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit += 1) {
      crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
    }
  }
  return (crc ^ 0xffffffff) >>> 0;
}

// Either wire form: hex digits (some servers leave leading zeros out) or an unsigned number. NaN fits no checksum.
function wireChecksum(value) {
  if (typeof value === 'string') {
    return /^[0-9A-Fa-f]{1,8}$/.test(value) ? parseInt(value, 16) : NaN;
  }
  return typeof value === 'number' ? value : NaN;
}

function parseServer(ip) {
  const text = typeof ip === 'string' ? ip : '';
  if (net.isIPv6(text)) {
    return { host: text, port: DEFAULT_PORT };
  }
  const parts = /^(?:\[([^\]]+)\]|([!-.0-9;-~]+))(?::(\d{1,5}))?$/.exec(text);
  const port = parts && parts[3] !== undefined ? Number(parts[3]) : DEFAULT_PORT;
  if (!parts || (parts[1] && !net.isIPv6(parts[1])) || port < 1 || port > 65535) {
    throw badRequest('The server is given as HOST, HOST:PORT or [IPv6]:PORT.');
  }
  return { host: parts[1] || parts[2], port };
}

// One attempt. `share` and `rest` are the milliseconds for it and for the whole call: what cannot be repeated once it
// was sent is waited for to the end instead.
function post(server, body, share, rest, repeatable, turn) {
  return new Promise((resolve, reject) => {
    let connected = false;
    let timer;
    const start = process.uptime() * 1000;
    const request = http.request({
      host: server.host,
      port: server.port,
      method: 'POST',
      path: '/',
      agent: false,
      // Before Node 20 only one address is tried: each attempt takes the next of them.
      lookup: (name, options, done) => {
        dns.lookup(name, Object.assign({}, options, { verbatim: false, all: true }), (error, found) => {
          const one = error || options.all ? null : found[turn % found.length];
          done(error, one ? one.address : found, one ? one.family : undefined);
        });
      },
      headers: { 'Content-Type': 'application/json', 'Content-Length': body.length, Connection: 'close' },
    });

    function fail(code, message) {
      clearTimeout(timer);
      reject(new CertError(code, message, true, connected));
      request.destroy();
    }
    function late() {
      fail('Timeout', connected ? 'The server did not answer in time.' : 'The server could not be reached in time.');
    }
    // A program that burns in the callback of another device holds up this one: what came meanwhile is read first.
    function waitFor(milliseconds) {
      clearTimeout(timer);
      const mine = setTimeout(() => setImmediate(() => mine === timer && late()), milliseconds);
      timer = mine;
    }
    function lost(error) {
      const code = error && error.code ? ` (${error.code})` : '';
      if (code.startsWith(' (HPE_')) {
        fail('BadReply', `What answered does not speak HTTP as a server should${code}: check the address.`);
      } else if (connected) {
        fail('ConnectionLost', `The connection broke before the reply was whole${code}.`);
      } else {
        fail('Unreachable', `The server cannot be reached${code}: check address, port and that it runs.`);
      }
    }

    waitFor(share);
    request.on('socket', (socket) => {
      socket.prependListener('connect', () => { // before the request is sent
        const left = start + rest - process.uptime() * 1000;
        if (!repeatable && left <= 0) {
          late(); // nothing was sent, and nobody would wait for the certificate
          return;
        }
        connected = true;
        if (!repeatable) {
          waitFor(Math.max(1, left));
        }
      });
    });
    request.on('error', lost);
    request.on('close', lost);
    request.on('response', (response) => {
      const chunks = [];
      let size = 0;
      response.on('data', (chunk) => {
        size += chunk.length;
        chunks.push(chunk);
        if (size > MAX_REPLY) {
          fail('BadReply', 'The reply is too long to be one.');
        }
      });
      response.on('aborted', lost);
      response.on('error', lost);
      response.on('end', () => {
        if (!response.complete) {
          lost();
          return;
        }
        clearTimeout(timer);
        resolve({ http: response.statusCode, bytes: Buffer.concat(chunks) });
        request.destroy();
      });
    });
    request.end(body);
  });
}

// The reply as text and object, once it is known to be one and to say OK.
function readReply(reply) {
  const text = reply.bytes.toString('utf8');
  let fields = null;
  try {
    fields = JSON.parse(text);
  } catch (error) {
    // told below, with all else that is no object
  }
  const isObject = typeof fields === 'object' && fields !== null && !Array.isArray(fields);
  if (!isObject || !Buffer.from(text, 'utf8').equals(reply.bytes)) {
    const final = reply.http >= 300 && reply.http < 500;
    const message = `HTTP status ${reply.http} and no JSON object: is this the certificate server?`;
    throw new CertError('BadReply', message, !final, true);
  }
  if (reply.http === 200 && fields.Status === 'OK') {
    return { text, fields };
  }
  if (typeof fields.Status !== 'string' || fields.Status === 'OK') {
    throw badReply(`The reply has HTTP status ${reply.http} and no Status that fits.`);
  }
  const message = typeof fields.Message === 'string' ? fields.Message : `The server refused: ${fields.Status}.`;
  // Only StoreUnavailable says that nothing was given out.
  const again = reply.http >= 500 || reply.http === 408;
  throw new CertError(fields.Status, message, again, fields.Status !== 'StoreUnavailable');
}

// The reply must be about what was asked; a server that has no DeviceID in its replies is believed.
function checkIdentity(fields, pk, id) {
  if (fields.ProductKey !== pk) {
    throw badReply('The reply is about another ProductKey.');
  }
  if (id && fields.DeviceID && fields.DeviceID !== id) {
    throw badReply('The reply is about another DeviceID.');
  }
}

const CERTIFICATE = {
  ProductKey: /^[ -~]{1,64}$/,
  DeviceName: /^[ -~]{1,32}$/,
  DeviceSecret: /^[ -~]{1,64}$/,
  ProductSecret: /^[ -~]{0,64}$/,
  ProductID: /^[ -~]{0,64}$/,
  DeviceID: /^[ -~]{0,64}$/,
};

function checkCertificate(fields) {
  for (const name of Object.keys(CERTIFICATE)) {
    const optional = (name === 'ProductID' || name === 'DeviceID') && fields[name] === undefined;
    if (!optional && (typeof fields[name] !== 'string' || !CERTIFICATE[name].test(fields[name]))) {
      throw badReply(`The reply has no valid ${name}.`);
    }
  }
  const names = ['ProductKey', 'DeviceName', 'DeviceSecret', 'ProductSecret', 'ProductID'];
  const payload = names.map((name) => fields[name]).join('');
  if (wireChecksum(fields.CRC32) !== crc32(Buffer.from(payload, 'utf8'))) {
    throw new CertError('WrongCRC32', 'The checksum of the reply does not fit: do not burn it.', true, true);
  }
}

function pause(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}

async function exchange(ip, pk, id, action, options) {
  const { timeout, retries, delay } = Object.assign({}, DEFAULTS, options);
  if (![timeout, retries, delay].every((value) => Number.isFinite(value) && value >= 0 && value <= MAX_OPTION)) {
    throw badRequest(`timeout, retries and delay are numbers from 0 to ${MAX_OPTION}.`);
  }
  if (typeof pk !== 'string' || (id !== null && id !== undefined && typeof id !== 'string')) {
    throw badRequest('The ProductKey is a string, the DeviceID a string or null.');
  }
  const server = parseServer(ip);
  const device = id ? id.trim() : '';
  if (id && !device) {
    throw badRequest('The DeviceID is white space alone: pass null for a device that has none.');
  }
  const body = Buffer.from(JSON.stringify({ ProductKey: pk, DeviceID: device || null, Action: action }), 'utf8');
  const end = process.uptime() * 1000 + timeout; // a clock that nobody sets
  for (let attempt = 0; ; attempt += 1) {
    try {
      const rest = Math.max(1, end - process.uptime() * 1000);
      const share = Math.max(1, Math.min(rest, timeout / (retries + 1)));
      const { text, fields } = readReply(await post(server, body, share, rest, device !== '', attempt));
      checkIdentity(fields, pk, device);
      if (action === 0) {
        checkCertificate(fields);
      }
      return text;
    } catch (error) {
      const wait = delay * Math.pow(2, attempt);
      const safe = device !== '' || !error.spent;
      if (!error.again || !safe || attempt >= retries || process.uptime() * 1000 + wait >= end) {
        throw error;
      }
      await pause(wait);
    }
  }
}

function deliver(promise, callback) {
  if (typeof callback === 'function') {
    // From nextTick, so that what the callback throws is the program's own error and not a rejection.
    promise.then(
      (text) => process.nextTick(callback, text, null),
      (error) => process.nextTick(callback, JSON.stringify({ Status: error.code, Message: error.message }), error)
    );
  }
  return promise;
}

function req_dev_cert(ip, pk, id, callback, options) {
  return deliver(exchange(ip, pk, id, 0, options), callback);
}

function send_burn_result_by_did(ip, pk, id, result, callback, options) {
  if (result !== undefined && typeof result !== 'boolean') {
    return deliver(Promise.reject(badRequest('The result of a burn is true or false.')), callback);
  }
  return deliver(exchange(ip, pk, id, result === false ? 2 : 1, options), callback);
}

module.exports = { req_dev_cert, send_burn_result_by_did, crc32, CertError, DEFAULTS };
