// `node server.mjs ./auth.mjs PORT`: makes Better Auth's tables and serves it, on this machine only.
import { createServer } from "node:http";
import { getMigrations } from "better-auth/db/migration";
import { toNodeHandler } from "better-auth/node";

const [, , configuration, port] = process.argv;
const { auth } = await import(configuration);

const { runMigrations } = await getMigrations(auth.options);
await runMigrations();

createServer(toNodeHandler(auth)).listen(Number(port), "127.0.0.1", () => console.log(JSON.stringify({ serving: port })));
