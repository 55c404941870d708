// SPDX-License-Identifier: Apache-2.0
// `http.js server ADDRESS PORT` answers each POST with its body reversed, and GET /connections with how many it has
// accepted. `http.js client ADDRESS PORT` keeps eight connections alive, compares every answer, and goes on until its
// input ends.
'use strict';
const crypto = require('crypto');
const http = require('http');

const CONNECTIONS = 8;
const [role, host, port] = process.argv.slice(2);

function serve() {
    let connections = 0;
    const server = http.createServer(async (request, response) => {
        if (request.url === '/connections') return response.end(String(connections));
        response.end((await whole(request)).reverse());
    });
    server.on('connection', () => connections++);
    server.keepAliveTimeout = 0;
    server.listen(port, host);
}

async function whole(stream) {
    const parts = [];
    for await (const part of stream) parts.push(part);
    return Buffer.concat(parts);
}

const agent = new http.Agent({ keepAlive: true, maxSockets: CONNECTIONS });

function ask(method, path, body) {
    return new Promise((resolve, reject) => {
        const request = http.request({ host, port, agent, method, path }, async (response) => {
            resolve(await whole(response));
        });
        request.on('error', reject);
        request.end(body);
    });
}

async function load() {
    let more = true;
    let requests = 0;
    process.stdin.on('end', () => (more = false)).resume();
    const one = async () => {
        while (more) {
            const body = crypto.randomBytes(crypto.randomInt(200000));
            const answer = await ask('POST', '/', body);
            if (!answer.equals(Buffer.from(body).reverse())) throw new Error(`answer ${requests} is wrong`);
            requests++;
        }
    };
    await Promise.all(Array.from({ length: CONNECTIONS }, one));
    const connections = Number(await ask('GET', '/connections'));
    console.log(JSON.stringify({ connections, requests }));
    process.exit(0);
}

if (role === 'server') serve();
else load();
