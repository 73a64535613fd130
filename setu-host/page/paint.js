// What everything that is drawn shares: sharp canvases, the theme's colours, and a colour for each session.

const probe = document.createElement('i');
probe.hidden = true;
document.body.append(probe);

/** Colours of the theme in use, by the names that the style sheet gives them. */
export function colours(...names) {
  return names.map((name) => {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  });
}

/** A session's colour, the same wherever it is seen; neighbours differ most. */
export function sessionColour(id) {
  const [lightness, chroma] = isDark() ? [0.74, 0.125] : [0.6, 0.13];
  return `oklch(${lightness} ${chroma} ${(id * 137.508 + 180) % 360})`;
}

let dark = null;
document.addEventListener('setu-theme', () => { dark = null; });
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => { dark = null; });

function isDark() {
  dark ??= colours('is-dark')[0] === 'rgb(0, 0, 0)';
  return dark;
}

/** A canvas's context, its lines as sharp as the screen, emptied; its width is what the page gives it. */
export function context(canvas, height) {
  const scale = devicePixelRatio || 1;
  const width = canvas.clientWidth;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext('2d');
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return [context, width];
}

/** A session's name as the logs have it, without what all have in common. */
export const sessionName = (id) => id.toString(16).padStart(8, '0');

/** A number in few letters. */
export function short(value) {
  if (value === null || !Number.isFinite(value)) return '–';
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(0)} k`;
  return value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1);
}

/** Seconds in few letters. */
export function seconds(value) {
  if (value === null || !Number.isFinite(value)) return '–';
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 0.00995) return `${(value * 1e3).toFixed(1)} ms`;
  if (value < 1) return `${(value * 1e3).toFixed(0)} ms`;
  if (value < 60) return `${value.toFixed(1)} s`;
  return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

export function element(tag, className = '', text = '') {
  return Object.assign(document.createElement(tag), { className, textContent: text });
}

/** Changes a text only if it is another, which spares the browser most of the work. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
