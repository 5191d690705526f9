// Express + pg: routers and middleware as its guide shows them, SQL by hand, a pool.

import express from "express";
import pg from "pg";

const FIELDS = "id, user_id, title, description, is_completed, version, created_at, updated_at";
const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/i;
const size = Number(process.env.POOL_SIZE);

const pool = new pg.Pool({ connectionString: process.env.DATABASE_URL, max: size, min: size, idleTimeoutMillis: 0 });
const app = express();
app.disable("x-powered-by");
app.disable("etag");
const json = express.json({ limit: "2mb" });

// A name makes pg prepare the statement once a connection.
const query = (name, text, values) => pool.query({ name, text, values });

class Refused extends Error {}

function refuse(why) {
  throw new Refused(why);
}

function uuid(value) {
  return UUID.test(value ?? "") ? value : refuse("not a UUID");
}

function number(value, usual) {
  if (value === undefined) return usual;
  const found = Number(value);
  return Number.isInteger(found) && found > 0 && found <= 200 ? found : refuse("not a number from 1 to 200");
}

const text = (value, least, most) => typeof value === "string" && value.length >= least && value.length <= most;

function checked(task, whole) {
  if (typeof task !== "object" || task === null) refuse("not a task");
  const { title, description, is_completed } = task;
  if ((whole || title !== undefined) && !text(title, 1, 255)) refuse("title");
  if (description !== undefined && description !== null && !text(description, 0, 10000)) refuse("description");
  if (is_completed !== undefined && typeof is_completed !== "boolean") refuse("is_completed");
  return task;
}

app.get("/livez", (req, res) => res.json({ status: "ok" }));

app.use("/v1", (req, res, next) => {
  req.owner = uuid(req.get("x-user-id"));
  next();
});

app.get("/v1/tasks", async (req, res) => {
  const limit = number(req.query.limit, 50);
  const { before, before_id } = req.query;
  const found =
    before === undefined
      ? await query(
          "list",
          `SELECT ${FIELDS} FROM tasks WHERE user_id = $1 ORDER BY created_at DESC, id DESC LIMIT $2`,
          [req.owner, limit],
        )
      : await query(
          "later",
          `SELECT ${FIELDS} FROM tasks WHERE user_id = $1 AND (created_at, id) < ($3, $4)
           ORDER BY created_at DESC, id DESC LIMIT $2`,
          [req.owner, limit, before, uuid(before_id)],
        );
  res.json({ items: found.rows });
});

app.get("/v1/tasks/:id", async (req, res) => {
  const found = await query("read", `SELECT ${FIELDS} FROM tasks WHERE user_id = $1 AND id = $2`, [
    req.owner,
    uuid(req.params.id),
  ]);
  if (found.rows.length === 0) return res.status(404).json({ error: "no such task" });
  res.json(found.rows[0]);
});

app.post("/v1/tasks", json, async (req, res) => {
  const { title, description = null, is_completed = false } = checked(req.body, true);
  const made = await query(
    "create",
    `INSERT INTO tasks (user_id, id, title, description, is_completed)
     VALUES ($1, gen_random_uuid(), $2, $3, $4) RETURNING ${FIELDS}`,
    [req.owner, title, description, is_completed],
  );
  res.status(201).json(made.rows[0]);
});

app.patch("/v1/tasks/:id", json, async (req, res) => {
  const { title, description, is_completed } = checked(req.body, false);
  const changed = await query(
    "update",
    `UPDATE tasks SET title = coalesce($3, title), is_completed = coalesce($4, is_completed),
       description = CASE WHEN $5 THEN $6 ELSE description END, version = version + 1, updated_at = now()
     WHERE user_id = $1 AND id = $2 RETURNING ${FIELDS}`,
    [req.owner, uuid(req.params.id), title, is_completed, description !== undefined, description],
  );
  if (changed.rows.length === 0) return res.status(404).json({ error: "no such task" });
  res.json(changed.rows[0]);
});

app.post("/v1/tasks/batch", json, async (req, res) => {
  const { operations } = req.body ?? {};
  if (!Array.isArray(operations) || operations.length === 0 || operations.length > 1000) refuse("operations");
  for (const one of operations) if (one?.op !== "create") refuse("op");
  const tasks = operations.map((one) => checked(one.task, true));
  const made = await query(
    "batch",
    `INSERT INTO tasks (user_id, id, title, description, is_completed)
     SELECT $1, * FROM unnest($2::uuid[], $3::text[], $4::text[], $5::boolean[]) RETURNING ${FIELDS}`,
    [
      req.owner,
      operations.map((one) => uuid(one.id)),
      tasks.map((task) => task.title),
      tasks.map((task) => task.description ?? null),
      tasks.map((task) => task.is_completed ?? false),
    ],
  );
  res.json({ results: made.rows.map((task) => ({ op: "create", id: task.id, task })) });
});

app.use((error, req, res, next) => {
  const status = error instanceof Refused ? 400 : (error.status ?? 500);
  if (status === 500) console.error(error);
  res.status(status).json({ error: error.message });
});

const server = app.listen(Number(process.argv[2]), "127.0.0.1");
process.on("SIGTERM", () => {
  server.close();
  server.closeAllConnections();
  pool.end();
});
