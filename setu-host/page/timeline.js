// Steps as they ran, one column each: what every session computed in it, who lost pages, and the time it took beside
// what was predicted.

import { colours, context, seconds, sessionColour, sessionName, setText } from './paint.js';

const canvas = document.getElementById('timeline');
const readout = document.getElementById('step');
const KEPT = 600;
const COLUMN = 6;
const LANES = 150;
const MOST_LANES = 60;
const TIMES = 56;
const GAP = 10;

// All steps, and those that are shown while the view is held.
let steps = [];
let held = null;
// The step that was chosen, by its number.
let chosen = null;
let pause = () => {};
let resume = () => {};

export function start(onPause, onResume) {
  pause = onPause;
  resume = onResume;
  canvas.addEventListener('pointermove', (event) => choose(at(event.offsetX), false));
  canvas.addEventListener('pointerleave', () => held === null && choose(null, false));
  canvas.addEventListener('click', (event) => {
    choose(at(event.offsetX), true);
  });
  canvas.addEventListener('keydown', (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
    if (event.key === 'Escape' && held !== null) {
      event.stopPropagation();
      resume();
      choose(null, false);
    } else if (event.key in moves) {
      event.preventDefault();
      move(moves[event.key]);
    }
  });
}

/** Holds what is shown, or lets it go on. */
export function hold(isHeld) {
  held = isHeld ? steps.slice() : null;
  if (!isHeld) chosen = null;
  draw();
}

export function begin() {
  steps = [];
  chosen = null;
  draw();
}

export function take(frame) {
  steps.push(...frame.steps);
  if (steps.length > KEPT) steps.splice(0, steps.length - KEPT);
}

function visible() {
  const room = Math.max(1, Math.floor(canvas.clientWidth / COLUMN));
  return (held ?? steps).slice(-room);
}

function at(x) {
  const shown = visible();
  const index = shown.length - 1 - Math.floor((canvas.clientWidth - x) / COLUMN);
  return shown[index]?.number ?? null;
}

function move(by) {
  const shown = visible();
  if (shown.length === 0) return;
  const from = shown.findIndex((step) => step.number === chosen);
  const start = from < 0 ? shown.length - (by < 0 ? 0 : 1) : from;
  choose(shown[Math.max(0, Math.min(shown.length - 1, start + by))].number, true);
}

function choose(number, holds) {
  if (number !== null && holds) pause();
  chosen = number;
  draw();
}

export function draw() {
  const shown = visible();
  const ids = new Set();
  shown.forEach((step) => {
    step.rows.forEach(([id]) => ids.add(id));
    step.preempted.forEach(([id]) => ids.add(id));
  });
  const sessions = [...ids].sort((a, b) => a - b).slice(-MOST_LANES);
  const lane = new Map(sessions.map((id, index) => [id, index]));
  const laneHeight = Math.min(12, LANES / Math.max(sessions.length, 1));
  const height = LANES + GAP + TIMES;
  const [paint, width] = context(canvas, height);
  const [ink, muted, accent, bad, line, sunk] = colours('ink', 'muted', 'accent', 'bad', 'line', 'hover');

  paint.fillStyle = line;
  paint.fillRect(0, height - 1, width, 1);
  paint.fillRect(0, LANES + GAP / 2, width, 1);
  const longest = Math.max(...shown.map((step) => Math.max(step.took_s, step.predicted_s)), 1e-6);
  const y = (time) => height - 1 - (time / longest) * (TIMES - 4);
  shown.forEach((step, index) => {
    const x = width - (shown.length - index) * COLUMN;
    if (step.number === chosen) {
      paint.fillStyle = sunk;
      paint.fillRect(x - 0.5, 0, COLUMN, height);
    }
    for (const [id, , , prefill] of step.rows) {
      if (!lane.has(id)) continue;
      const top = lane.get(id) * laneHeight;
      const size = Math.max(1, laneHeight - (laneHeight > 4 ? 1 : 0));
      const part = prefill ? size : Math.max(1, size * 0.34);
      paint.fillStyle = sessionColour(id);
      paint.fillRect(x, top + (size - part) / 2, COLUMN - (prefill ? 0 : 1), part);
    }
    for (const [id] of step.preempted) {
      if (!lane.has(id)) continue;
      paint.fillStyle = bad;
      paint.fillRect(x + 1, lane.get(id) * laneHeight, 3, Math.max(3, laneHeight - 1));
    }
    paint.fillStyle = step.failed ? bad : step.number === chosen ? ink : muted;
    paint.globalAlpha = step.failed || step.number === chosen ? 1 : 0.55;
    paint.fillRect(x, y(step.took_s), COLUMN - 1, height - 1 - y(step.took_s));
    paint.globalAlpha = 1;
    if (step.predicted_s > 0) {
      paint.fillStyle = accent;
      paint.fillRect(x, y(step.predicted_s) - 1, COLUMN - 1, 2);
    }
  });
  paint.fillStyle = muted;
  paint.font = '11px system-ui, sans-serif';
  paint.textBaseline = 'top';
  if (shown.length > 0) label(paint, seconds(longest), LANES + GAP / 2 + 3);
  if (ids.size > sessions.length) label(paint, `the latest ${sessions.length} of ${ids.size} sessions`, 2);
  tell(shown);
}

/** A text at the left, readable over what is drawn. */
function label(paint, text, y) {
  const [paper, muted] = colours('raised', 'muted');
  paint.fillStyle = paper;
  paint.globalAlpha = 0.8;
  paint.fillRect(0, y, paint.measureText(text).width + 6, 13);
  paint.globalAlpha = 1;
  paint.fillStyle = muted;
  paint.fillText(text, 2, y + 1);
}

/** Says in words what the chosen step, or the latest, was. */
function tell(shown) {
  const step = shown.find((step) => step.number === chosen) ?? shown.at(-1);
  canvas.setAttribute('aria-valuemin', String(shown[0]?.number ?? 0));
  canvas.setAttribute('aria-valuemax', String(shown.at(-1)?.number ?? 0));
  canvas.setAttribute('aria-valuenow', String(step?.number ?? 0));
  const text = step ? describe(step) : 'No step yet.';
  setText(readout, text);
  // What changes many times a second is no news to a screen reader.
  if (chosen !== null || held !== null || !step) canvas.setAttribute('aria-valuetext', text);
  else canvas.setAttribute('aria-valuetext', 'the latest step');
}

function describe(step) {
  const chunks = step.rows.filter(([, , , prefill]) => prefill);
  const decodes = step.rows.length - chunks.length;
  const tokens = chunks.reduce((sum, [, tokens]) => sum + tokens, 0);
  const parts = [`Step ${step.number}: ${seconds(step.took_s)}`];
  if (step.predicted_s > 0) parts[0] += `, ${seconds(step.predicted_s)} predicted`;
  if (chunks.length > 0) parts.push(`${chunks.length} prompt ${chunks.length === 1 ? 'chunk' : 'chunks'}, ${tokens} tokens`);
  if (decodes > 0) parts.push(`${decodes} of one token`);
  if (step.preempted.length > 0) parts.push(`preempted: ${step.preempted.map(([id]) => sessionName(id)).join(', ')}`);
  if (step.failed) parts.push('failed');
  return `${parts.join(' · ')}.`;
}
