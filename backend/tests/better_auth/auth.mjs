import { betterAuth } from "better-auth";
import { jwt } from "better-auth/plugins";
import pg from "pg";

export const auth = betterAuth({
  baseURL: process.env.BETTER_AUTH_URL,
  secret: process.env.BETTER_AUTH_SECRET,
  database: new pg.Pool({ connectionString: process.env.BETTER_AUTH_DATABASE_URL }),
  emailAndPassword: { enabled: true, requireEmailVerification: true },
  emailVerification: {
    // In place of this line goes your sender of mail.
    sendVerificationEmail: async ({ user, url }) => console.log(JSON.stringify({ to: user.email, url })),
  },
  plugins: [
    jwt({
      jwks: { rotationInterval: 30 * 24 * 60 * 60 }, // seconds; the old key stays published for another 30 days
      jwt: {
        audience: "tasks",
        expirationTime: "10m",
        definePayload: ({ user }) => ({ email: user.email, email_verified: user.emailVerified }),
      },
    }),
  ],
});
