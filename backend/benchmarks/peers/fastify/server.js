// Fastify + postgres.js: JSON schemas for what comes in and what goes out, SQL in tagged templates.

import Fastify from "fastify";
import postgres from "postgres";

const sql = postgres(process.env.DATABASE_URL, { max: Number(process.env.POOL_SIZE), prepare: true });
const app = Fastify({ logger: false, bodyLimit: 2 * 1024 * 1024 });

const uuid = { type: "string", format: "uuid" };
const title = { type: "string", minLength: 1, maxLength: 255 };
const description = { type: ["string", "null"], maxLength: 10000 };
const headers = { type: "object", properties: { "x-user-id": uuid }, required: ["x-user-id"] };
const params = { type: "object", properties: { id: uuid }, required: ["id"] };
const task = {
  type: "object",
  properties: {
    id: { type: "string" },
    user_id: { type: "string" },
    title: { type: "string" },
    description: { type: ["string", "null"] },
    is_completed: { type: "boolean" },
    version: { type: "integer" },
    created_at: { type: "string", format: "date-time" },
    updated_at: { type: "string", format: "date-time" },
  },
};
const newTask = {
  type: "object",
  properties: { title, description, is_completed: { type: "boolean" } },
  required: ["title"],
  additionalProperties: false,
};
const change = { ...newTask, required: [] };
const page = { type: "object", properties: { items: { type: "array", items: task } } };
const asked = {
  type: "object",
  properties: {
    limit: { type: "integer", minimum: 1, maximum: 200, default: 50 },
    before: { type: "string" },
    before_id: uuid,
  },
};
const batch = {
  type: "object",
  properties: {
    operations: {
      type: "array",
      minItems: 1,
      maxItems: 1000,
      items: {
        type: "object",
        properties: { op: { const: "create" }, id: uuid, task: newTask },
        required: ["op", "id", "task"],
      },
    },
  },
  required: ["operations"],
};
const results = {
  type: "object",
  properties: {
    results: {
      type: "array",
      items: { type: "object", properties: { op: { type: "string" }, id: { type: "string" }, task } },
    },
  },
};

// Ajv would turn 7 into "7" in a body as it turns "50" into 50 in a query.
const strictly = new (await import("ajv")).default({ coerceTypes: false, useDefaults: true, allowUnionTypes: true });
(await import("ajv-formats")).default(strictly);
const bodyCompiler = ({ schema, httpPart }) =>
  httpPart === "body" ? strictly.compile(schema) : loosely.compile(schema);
const loosely = new (await import("ajv")).default({ coerceTypes: "array", useDefaults: true, allowUnionTypes: true });
(await import("ajv-formats")).default(loosely);
app.setValidatorCompiler(bodyCompiler);

const fields = sql`id, user_id, title, description, is_completed, version, created_at, updated_at`;
const missing = (reply) => reply.code(404).send({ error: "no such task" });

app.get("/livez", async () => ({ status: "ok" }));

app.get("/v1/tasks", { schema: { headers, querystring: asked, response: { 200: page } } }, async (request) => {
  const owner = request.headers["x-user-id"];
  const { limit, before, before_id } = request.query;
  const items =
    before === undefined
      ? await sql`SELECT ${fields} FROM tasks WHERE user_id = ${owner}
                  ORDER BY created_at DESC, id DESC LIMIT ${limit}`
      : await sql`SELECT ${fields} FROM tasks
                  WHERE user_id = ${owner} AND (created_at, id) < (${before}::text::timestamptz, ${before_id})
                  ORDER BY created_at DESC, id DESC LIMIT ${limit}`;
  return { items };
});

app.get("/v1/tasks/:id", { schema: { headers, params, response: { 200: task } } }, async (request, reply) => {
  const [found] = await sql`SELECT ${fields} FROM tasks
                            WHERE user_id = ${request.headers["x-user-id"]} AND id = ${request.params.id}`;
  return found ?? missing(reply);
});

app.post("/v1/tasks", { schema: { headers, body: newTask, response: { 201: task } } }, async (request, reply) => {
  const { title, description = null, is_completed = false } = request.body;
  const [made] = await sql`INSERT INTO tasks (user_id, id, title, description, is_completed)
    VALUES (${request.headers["x-user-id"]}, ${crypto.randomUUID()}, ${title}, ${description}, ${is_completed})
    RETURNING ${fields}`;
  reply.code(201);
  return made;
});

app.patch(
  "/v1/tasks/:id",
  { schema: { headers, params, body: change, response: { 200: task } } },
  async (request, reply) => {
    const { title = null, description = null, is_completed = null } = request.body;
    const described = "description" in request.body;
    const [changed] = await sql`UPDATE tasks
      SET title = coalesce(${title}, title), is_completed = coalesce(${is_completed}, is_completed),
          description = CASE WHEN ${described}::boolean THEN ${description} ELSE description END,
          version = version + 1, updated_at = now()
      WHERE user_id = ${request.headers["x-user-id"]} AND id = ${request.params.id}
      RETURNING ${fields}`;
    return changed ?? missing(reply);
  },
);

app.post("/v1/tasks/batch", { schema: { headers, body: batch, response: { 200: results } } }, async (request) => {
  const { operations } = request.body;
  const made = await sql`INSERT INTO tasks (user_id, id, title, description, is_completed)
    SELECT ${request.headers["x-user-id"]}::uuid, id, title, description, coalesce(is_completed, false)
    FROM jsonb_to_recordset(${sql.json(operations.map(({ id, task }) => ({ id, ...task })))}::jsonb)
      AS asked(id uuid, title text, description text, is_completed boolean)
    RETURNING ${fields}`;
  return { results: made.map((row) => ({ op: "create", id: row.id, task: row })) };
});

await app.listen({ port: Number(process.argv[2]), host: "127.0.0.1" });
process.on("SIGTERM", async () => {
  await app.close();
  await sql.end({ timeout: 1 });
});
