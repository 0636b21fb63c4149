// Checks the link to the certificate server: node test.js [ip[:port]] [ProductKey]
// It asks once without a DeviceID, which takes a fresh certificate each time, and once with one, and reports both burnt.

var devReq = require('./devReqCert');

var ip = process.argv[2] || '127.0.0.1';
var pk = process.argv[3] || 'a1SampleWf0';
var did = null;

// Called with each reply. A real station writes the certificate into the device here, and reports what came of it.
function handler(devInfo, error) {
  console.log('DevInfo:' + devInfo);
  if (error) {
    process.exitCode = 1;
    return;
  }
  var certificate = JSON.parse(devInfo);
  devReq.send_burn_result_by_did(ip, pk, certificate.DeviceID, true, function (answer, refusal) {
    console.log('Burn:' + answer);
    if (refusal) {
      process.exitCode = 1;
    }
  });
}

// null: the device has no id of its own, and the server makes one up.
devReq.req_dev_cert(ip, pk, null, handler);

// With an id, the same certificate comes back each time.
did = '123456';
devReq.req_dev_cert(ip, pk, did, handler);
