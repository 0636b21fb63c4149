// The peer: Node's bare http server that echoes JSON and saves nothing. node node.js PORT
"use strict";

const http = require("http");

const server = http.createServer((request, response) => {
  const chunks = [];
  request.on("data", (chunk) => chunks.push(chunk));
  request.on("end", () => {
    const message = JSON.parse(Buffer.concat(chunks).toString());
    const body = JSON.stringify({ ...message, Status: "OK" });
    response.writeHead(200, { "Content-Type": "application/json", "Content-Length": Buffer.byteLength(body) });
    response.end(body);
  });
});

server.listen(Number(process.argv[2]), "127.0.0.1", 1024);
