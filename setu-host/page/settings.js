// How answers are asked for: the system prompt, sampling and the key. What is left empty isn't sent, so that what the
// server is configured with holds.

import { key } from './api.js';

const STORE = 'setu.settings';

// The request's field, its name for people, and bounds that arrows keep to; what is typed the server checks.
const FIELDS = [
  ['temperature', 'Temperature', { min: 0, max: 100, step: 0.1 }],
  ['top_p', 'Top p', { min: 0, max: 1, step: 0.05 }],
  ['top_k', 'Top k', { min: 0, step: 1 }],
  ['min_p', 'Min p', { min: 0, max: 1, step: 0.05 }],
  ['max_completion_tokens', 'Longest answer', { min: 1, step: 1 }],
  ['seed', 'Seed', { step: 1 }],
  ['repetition_penalty', 'Repetition penalty', { min: 0, max: 100, step: 0.05 }],
  ['presence_penalty', 'Presence penalty', { min: -100, max: 100, step: 0.1 }],
  ['frequency_penalty', 'Frequency penalty', { min: -100, max: 100, step: 0.1 }],
];

const panel = document.getElementById('settings');
const toggle = document.getElementById('settings-toggle');
const system = document.getElementById('system');
const keyInput = document.getElementById('key');
const inputs = new Map();

export function start(onKey) {
  for (const [name, label, bounds] of FIELDS) {
    const input = Object.assign(document.createElement('input'), { type: 'number', placeholder: 'default', inputMode: 'decimal', ...bounds });
    // Arrows move by the step; any number may be typed.
    input.name = name;
    const field = document.createElement('label');
    field.append(label, input);
    document.getElementById('sampling').append(field);
    inputs.set(name, input);
  }
  restore();
  keyInput.value = key.get();
  toggle.addEventListener('click', () => show(panel.hidden));
  panel.addEventListener('submit', (event) => event.preventDefault());
  panel.noValidate = true;
  panel.addEventListener('input', (event) => {
    event.target.removeAttribute('aria-invalid');
    if (event.target !== keyInput) store();
  });
  panel.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') {
      show(false);
      toggle.focus();
    }
  });
  keyInput.addEventListener('change', () => {
    key.set(keyInput.value.trim());
    onKey();
  });
  document.getElementById('reset').addEventListener('click', () => {
    system.value = '';
    inputs.forEach((input) => {
      input.value = '';
      input.removeAttribute('aria-invalid');
    });
    store();
  });
}

/** What a request says beside its messages. */
export function sampling() {
  const given = [...inputs].filter(([, input]) => input.value.trim() !== '');
  return Object.fromEntries(given.map(([name, input]) => [name, Number(input.value)]));
}

export const systemPrompt = () => system.value.trim();

/** Shows what holds where nothing is given. */
export function showDefaults(components) {
  const section = components.find((component) => component.kind === 'sampling');
  for (const { name, value } of section?.settings ?? []) {
    const input = inputs.get(name === 'max_tokens' ? 'max_completion_tokens' : name);
    if (input && value !== null) input.placeholder = value;
  }
}

/** Shows which setting the server refused; says whether it is one of these. */
export function pointAt(param) {
  const input = inputs.get(param === 'max_tokens' ? 'max_completion_tokens' : param);
  if (!input) return false;
  input.setAttribute('aria-invalid', 'true');
  show(true);
  return true;
}

/** Asks for a key; without `focuses` it leaves whoever is typing elsewhere alone. */
export function askForKey(focuses = true) {
  show(true);
  keyInput.setAttribute('aria-invalid', 'true');
  if (focuses) keyInput.focus();
}

function show(shown) {
  panel.hidden = !shown;
  toggle.setAttribute('aria-expanded', String(shown));
}

function store() {
  const values = Object.fromEntries([...inputs].map(([name, input]) => [name, input.value]));
  localStorage.setItem(STORE, JSON.stringify({ system: system.value, values }));
}

function restore() {
  let stored = null;
  try {
    stored = JSON.parse(localStorage.getItem(STORE));
  } catch {
    // What isn't ours to read is written anew.
  }
  system.value = stored?.system ?? '';
  inputs.forEach((input, name) => { input.value = stored?.values?.[name] ?? ''; });
}
