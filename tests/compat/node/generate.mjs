// Opens export folders with transformers.js, and prints the ids that it writes as JSON.
//
// node generate.mjs FOLDER

import { readFileSync } from "node:fs";
import path from "node:path";

import { AutoModelForCausalLM, AutoTokenizer, env } from "@huggingface/transformers";

const folder = path.resolve(process.argv[2]);
const asked = JSON.parse(readFileSync(path.join(folder, "asked.json"), "utf8"));
env.localModelPath = folder;
env.allowRemoteModels = false;

const found = { version: env.version, models: {} };
for (const name of asked.models) {
  const tokenizer = await AutoTokenizer.from_pretrained(name);
  tokenizer.padding_side = "left";
  const chat = tokenizer.apply_chat_template(asked.messages, { tokenize: false, add_generation_prompt: true });
  found.models[name] = { chat };
  for (const dtype of asked.dtypes) {
    const model = await AutoModelForCausalLM.from_pretrained(name, { dtype });
    const write = async (text) => {
      const inputs = await tokenizer(text, { padding: true });
      const ids = await model.generate({ ...inputs, max_new_tokens: asked.num_tokens, do_sample: false });
      return ids.tolist().map((row) => row.map(Number));
    };
    const alone = [];
    for (const prompt of asked.prompts) alone.push(...(await write(prompt)));
    found.models[name][dtype] = { alone, batch: await write(asked.prompts) };
    await model.dispose();
  }
}
process.stdout.write(JSON.stringify(found));
