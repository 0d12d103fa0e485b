// An agent with a shell on Vercel's AI SDK: one question, and its last words are the answer.
//
//     NODE_PATH=.../node_modules node ai_sdk_agent.cjs "How many files are here?"
//
// Environment: OPENAI_BASE_URL, OPENAI_API_KEY, OPENAI_MODEL ("policy").

const { spawnSync } = require("node:child_process");
const { generateText, stepCountIs, tool } = require("ai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { z } = require("zod");

const COMMAND_MS = 30_000;

const shell = tool({
  description: "Runs a shell command in the current folder.",
  inputSchema: z.object({ command: z.string().describe("what the shell is given") }),
  execute: async ({ command }) => {
    const done = spawnSync("sh", ["-c", command], { encoding: "utf8", timeout: COMMAND_MS });
    return `exit status ${done.status}\n${done.stdout}${done.stderr}`;
  },
});

async function main(question) {
  const { OPENAI_BASE_URL, OPENAI_API_KEY, OPENAI_MODEL = "policy" } = process.env;
  const provider = createOpenAICompatible({ name: "forge", baseURL: OPENAI_BASE_URL, apiKey: OPENAI_API_KEY });
  const { text } = await generateText({
    model: provider(OPENAI_MODEL),
    system: "Do what is asked, with the shell.",
    prompt: question,
    tools: { shell },
    stopWhen: stepCountIs(20),
  });
  console.log(text);
}

main(process.argv[2]).catch((error) => {
  console.error(error);
  process.exit(1);
});
