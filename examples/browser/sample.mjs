// A picture from an export, in the browser: the same steps as examples/sample_without_torch.py.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import {WordTokenizer} from "./tokenizer.mjs";

const PARTS = ["text_encoder", "transformer", "decoder"];
const ARRAYS = {float32: Float32Array, int64: BigInt64Array, int32: Int32Array, bool: Uint8Array};

/** An export: its graphs, tokenizers and what `parts.json` says of them. */
export class Export {
  /** @param {string} folder Address of the export's folder. */
  static async open(folder) {
    ort.env.wasm.numThreads = 1; // more need a page that is isolated from others
    const found = new Export();
    found.parts = await (await get(`${folder}/parts.json`)).json();
    for (const name of PARTS) {
      if (!(name in found.parts)) throw new Error(`${folder}: ${name}.onnx is missing. Fix: export a text-to-image model.`);
    }
    found.sessions = {};
    for (const name of PARTS) {
      const bytes = await (await get(`${folder}/${name}.onnx`)).arrayBuffer();
      found.sessions[name] = await ort.InferenceSession.create(new Uint8Array(bytes), {executionProviders: ["wasm"]});
    }
    found.tokenizers = {};
    for (const [name, facts] of Object.entries(found.constants("text_encoder").tokenizers)) {
      found.tokenizers[name] = new WordTokenizer(await (await get(`${folder}/${facts.file}`)).json());
    }
    return found;
  }

  constants(part) {
    return this.parts[part].constants;
  }

  /** Calls one graph with tensors by name. */
  async run(part, inputs) {
    const session = this.sessions[part];
    return session.run(Object.fromEntries(session.inputNames.map(name => [name, inputs[name]])));
  }

  /** The transformer's conditioning of prompts. */
  async encode(prompts) {
    const inputs = {};
    for (const [name, facts] of Object.entries(this.constants("text_encoder").tokenizers)) {
      const rows = prompts.map(prompt => this.tokenizers[name].encode(prompt, facts));
      for (const kind of facts.inputs) {
        inputs[`${name}.${kind}`] = tensor("int64", rows.flatMap(row => row[kind]), [rows.length, facts.max_length]);
      }
    }
    return this.run("text_encoder", inputs);
  }

  /**
   * Samples a picture.
   * @param {string} prompt
   * @param {Float32Array} noise A standard normal of `latent_shape`.
   * @param {(done: number, total: number) => void} onStep Told after every step.
   * @returns {Promise<{width: number, height: number, planes: Float32Array}>} Red, green and blue in [0, 1].
   */
  async sample(prompt, noise, onStep = () => {}) {
    const {timesteps, coefficients, latent_shape: shape, guidance_scale: scale, shared_inputs: shared} =
      this.constants("transformer");
    const prompts = scale === 1 ? [prompt] : [prompt, this.constants("text_encoder").negative_prompt];
    const conditioning = await this.encode(prompts);
    for (const [name, given] of Object.entries(shared)) conditioning[name] = nested(given);
    const known = [noise];
    for (const [step, time] of timesteps.entries()) {
      const latents = sum(known, coefficients[step]);
      const rows = new Float32Array(latents.length * prompts.length);
      prompts.forEach((_, i) => rows.set(latents, i * latents.length));
      const {output} = await this.run("transformer", {
        ...conditioning,
        hidden_states: new ort.Tensor("float32", rows, [prompts.length, ...shape]),
        timestep: tensor(this.parts.transformer.inputs.timestep.dtype, prompts.map(() => time), [prompts.length]),
      });
      known.push(guided(output.data, latents.length, scale));
      onStep(step + 1, timesteps.length);
    }
    const latents = new ort.Tensor("float32", sum(known, coefficients.at(-1)), [1, ...shape]);
    const {image} = await this.run("decoder", {latents});
    return {width: image.dims[3], height: image.dims[2], planes: image.data};
  }
}

async function get(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`${address} cannot be read: ${answer.status}. Fix: serve the export's folder too.`);
  return answer;
}

function tensor(type, values, shape) {
  const array = ARRAYS[type].from(values, type === "int64" ? BigInt : Number);
  return new ort.Tensor(type, array, shape);
}

function nested({dtype, values}) {
  const shape = [];
  for (let level = values; Array.isArray(level); level = level[0]) shape.push(level.length);
  return tensor(dtype, [values].flat(Infinity), shape);
}

/** The sum of arrays with weights; there may be more weights than arrays. */
function sum(arrays, weights) {
  return Float32Array.from(arrays[0], (_, i) => arrays.reduce((total, array, j) => total + weights[j] * array[i], 0));
}

/** The prediction for the prompt (first half), led away from the one without (second half). */
function guided(output, length, scale) {
  if (scale === 1) return output.slice(0, length);
  return Float32Array.from({length}, (_, i) => output[length + i] + scale * (output[i] - output[length + i]));
}

/** Noise of a seed: mulberry32 and Box and Muller's method. */
export function drawNoise(length, seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
  return Float32Array.from({length}, () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
}

/** Draws planes of red, green and blue on a canvas. */
export function draw(canvas, {width, height, planes}) {
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height), size = width * height;
  for (let i = 0; i < size; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = Math.round(255 * planes[c * size + i]);
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}
