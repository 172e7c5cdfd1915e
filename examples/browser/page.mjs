// Connects the page with sample.mjs. The export lies in the folder `export`, or where index.html?export=ADDRESS says.

import {Export, draw, drawNoise} from "./sample.mjs";

const address = new URL(new URLSearchParams(location.search).get("export") ?? "export", location.href).href.replace(/\/$/, "");
const form = document.querySelector("form"), status = document.querySelector("output");
const button = form.querySelector("button"), canvas = document.querySelector("canvas");

async function main() {
  const found = await Export.open(address);
  const length = found.constants("transformer").latent_shape.reduce((a, b) => a * b);
  status.textContent = "Ready.";
  button.disabled = false;
  form.addEventListener("submit", async event => {
    event.preventDefault();
    button.disabled = true;
    const start = performance.now();
    const {prompt, seed} = Object.fromEntries(new FormData(form));
    try {
      const noise = drawNoise(length, Number(seed));
      draw(canvas, await found.sample(prompt, noise, (i, n) => { status.textContent = `Step ${i} of ${n}`; }));
      status.textContent = `Done in ${((performance.now() - start) / 1000).toFixed(1)} s.`;
    } catch (error) {
      status.textContent = String(error.message ?? error);
    }
    button.disabled = false;
  });
}

main().catch(error => { status.textContent = String(error.message ?? error); });
