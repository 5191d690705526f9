// Better Auth with the options that a test gives as JSON, and otherwise as it comes.
import { betterAuth } from "better-auth";
import { jwt } from "better-auth/plugins";
import pg from "pg";

const { jwt: ofPlugin, ...others } = JSON.parse(process.env.TEST_OPTIONS ?? "{}");

export const auth = betterAuth({
  baseURL: process.env.BETTER_AUTH_URL,
  secret: process.env.BETTER_AUTH_SECRET,
  database: new pg.Pool({ connectionString: process.env.BETTER_AUTH_DATABASE_URL }),
  emailAndPassword: { enabled: true },
  plugins: [jwt(ofPlugin)],
  ...others,
});
