// The tokenizer of the small models: whole words, split at spaces and between letters and signs.
// Other kinds of tokenizer.json are refused.

const SPECIAL = "SpecialToken", SEQUENCE = "Sequence";

export class WordTokenizer {
  /** @param {object} file Contents of tokenizer.json. */
  constructor(file) {
    const kinds = {
      "model.type": [file.model?.type, "WordLevel"],
      "normalizer": [file.normalizer?.type ?? null, null],
      "pre_tokenizer.type": [file.pre_tokenizer?.type, "Whitespace"],
      "post_processor.type": [file.post_processor?.type, "TemplateProcessing"],
    };
    for (const [name, [found, wanted]] of Object.entries(kinds)) {
      if (found !== wanted) {
        throw new Error(
          `tokenizer.json: ${name} = ${found} is not possible on this page: allowed is ${wanted}. ` +
          "Fix: tokenize with a library, such as tokenizers or transformers.js.");
      }
    }
    this.vocab = new Map(Object.entries(file.model.vocab));
    this.unknown = this.vocab.get(file.model.unk_token);
    this.template = file.post_processor.single;
    this.specials = file.post_processor.special_tokens;
  }

  /**
   * Numbers of a text, padded and cut to one length.
   * @param {string} text
   * @param {{max_length: number, pad_token_id: number, padding_side: string, strips: boolean, lowers: boolean}} facts
   *   As `parts.json` has them.
   * @returns {{input_ids: number[], attention_mask: number[]}}
   */
  encode(text, facts) {
    if (facts.strips) text = text.trim();
    if (facts.lowers) text = text.toLowerCase();
    const words = text.match(/[\p{L}\p{M}\p{N}_]+|[^\p{L}\p{M}\p{N}_\s]+/gu) ?? [];
    const numSpecial = this.template.filter(item => SPECIAL in item).length;
    const own = words.map(word => this.vocab.get(word) ?? this.unknown).slice(0, facts.max_length - numSpecial);
    const ids = this.template.flatMap(item => SEQUENCE in item ? own : this.specials[item[SPECIAL].id].ids);
    const padding = new Array(facts.max_length - ids.length).fill(facts.pad_token_id);
    const mask = ids.map(() => 1), unmasked = padding.map(() => 0);
    return facts.padding_side === "left"
      ? {input_ids: [...padding, ...ids], attention_mask: [...unmasked, ...mask]}
      : {input_ids: [...ids, ...padding], attention_mask: [...mask, ...unmasked]};
  }
}
