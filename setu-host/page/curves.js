// Rates, latencies and fill over the last minute: a number and its curve each.

import { colours, context, element, seconds, setText, short } from './paint.js';

const KEPT = 300;
// Fewer are drawn as if they were as many, so that a view that has just begun shows something.
const FEWEST = 75;
const HEIGHT = 44;

// Title, what is read off a frame (the main curve and a paler one), how numbers read, and the curve's fixed top.
const CURVES = [
  { title: 'Generated', unit: 'tokens/s', of: ({ rates }) => [rates.generated_tokens_per_s], text: short },
  { title: 'Prompts', unit: 'tokens/s', of: ({ rates }) => [rates.prefill_tokens_per_s], text: short },
  { title: 'First token', unit: 'p50', second: 'p95', of: ({ rates }) => [rates.ttft_p50_s, rates.ttft_p95_s], text: seconds },
  { title: 'Inter-token', unit: 'p50', second: 'p95', of: ({ rates }) => [rates.itl_p50_s, rates.itl_p95_s], text: seconds },
  { title: 'Running', unit: 'sessions', second: 'waiting', of: ({ totals }) => [totals.running, totals.waiting], text: short },
  { title: 'KV pages used', unit: '', of: ({ totals }) => [totals.kv_pages_used / Math.max(totals.kv_pages_total, 1)], text: (part) => `${(part * 100).toFixed(part < 0.1 ? 1 : 0)} %`, top: 1 },
];

const tiles = CURVES.map((curve) => {
  const tile = element('figure', 'tile');
  const value = element('b');
  const second = element('span', 'second');
  const canvas = element('canvas');
  canvas.setAttribute('aria-hidden', 'true');
  const title = element('figcaption', '', curve.title);
  title.append(second);
  const line = element('p');
  line.append(value, element('span', 'unit', curve.unit));
  tile.append(title, line, canvas);
  document.getElementById('curves').append(tile);
  return { ...curve, value, secondValue: second, canvas, kept: [] };
});

export function begin() {
  tiles.forEach((tile) => { tile.kept = []; });
}

export function take(frame) {
  for (const tile of tiles) {
    tile.kept.push(tile.of(frame));
    if (tile.kept.length > KEPT) tile.kept.shift();
  }
}

export function draw(frame) {
  const [main, pale, grid] = colours('accent', 'curve-second', 'line');
  for (const tile of tiles) {
    const [first, second] = tile.of(frame);
    setText(tile.value, tile.text(first));
    if (tile.second) setText(tile.secondValue, `${tile.second} ${tile.text(second)}`);
    const [paint, width] = context(tile.canvas, HEIGHT);
    const top = tile.top ?? Math.max(...tile.kept.flat().filter((value) => value !== null), 1e-9) * 1.1;
    paint.fillStyle = grid;
    paint.fillRect(0, HEIGHT - 1, width, 1);
    if (tile.second) curve(paint, width, tile.kept.map((values) => values[1]), top, pale, false);
    curve(paint, width, tile.kept.map((values) => values[0]), top, main, true);
  }
}

/** Draws a curve whose gaps are gaps, the latest value at the right. */
function curve(paint, width, values, top, colour, isFilled) {
  const step = width / (Math.max(values.length, FEWEST) - 1);
  const x = (index) => width - (values.length - 1 - index) * step;
  const y = (value) => HEIGHT - 2 - (Math.min(value, top) / top) * (HEIGHT - 5);
  paint.strokeStyle = colour;
  paint.lineWidth = 1.5;
  paint.lineJoin = 'round';
  for (let from = 0; from < values.length; from += 1) {
    if (values[from] === null) continue;
    let to = from;
    while (to + 1 < values.length && values[to + 1] !== null) to += 1;
    paint.beginPath();
    for (let at = from; at <= to; at += 1) paint.lineTo(x(at), y(values[at]));
    if (from === to) paint.lineTo(x(from) + 1, y(values[from]));
    paint.stroke();
    if (isFilled) {
      paint.lineTo(x(to), HEIGHT - 1);
      paint.lineTo(x(from), HEIGHT - 1);
      paint.globalAlpha = 0.14;
      paint.fillStyle = colour;
      paint.fill();
      paint.globalAlpha = 1;
    }
    from = to;
  }
}
