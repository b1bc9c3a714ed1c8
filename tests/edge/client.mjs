// supabase-js as an app has it, with a user's token and no Worker between. One line of JSON in is one chain of calls, as in
// [["from", "segmentation_results"], ["select", "id"]]; or ["subscribe", <filter>]. What comes back goes out as lines of JSON.
import { createInterface } from "node:readline";
import { createClient } from "@supabase/supabase-js";
import { WebSocket } from "ws"; // Node 22 has one of its own

const { SUPABASE_URL, SUPABASE_ANON_KEY, TOKEN } = process.env;
const supabase = createClient(SUPABASE_URL, SUPABASE_ANON_KEY, {
  accessToken: async () => TOKEN,
  auth: { persistSession: false, autoRefreshToken: false },
  db: { timeout: 10_000, retry: false },
  realtime: { transport: WebSocket },
});
const say = (line) => console.log(JSON.stringify(line));

function subscribe(filter) {
  const wanted = { event: "UPDATE", schema: "public", table: "segmentation_results", filter };
  supabase
    .channel("own-tasks")
    .on("postgres_changes", wanted, (change) => say({ change }))
    .on("system", {}, (system) => say({ system }))
    .subscribe((state, error) => say({ state, error: error?.message }));
}

for await (const line of createInterface({ input: process.stdin })) {
  const calls = JSON.parse(line);
  if (calls[0] === "subscribe") subscribe(calls[1]);
  else {
    const { data, error, status, count } = await calls.reduce((it, [method, ...given]) => it[method](...given), supabase);
    say({ reply: { data, error, status, count } });
  }
}
process.exit(0);
