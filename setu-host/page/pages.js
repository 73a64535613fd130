// The KV pages as a map, one cell a page: free, kept by the prefix cache, or held, in the colour of the first session
// that holds it; a mark in the middle says that others share it.

import { colours, context, element, sessionColour, sessionName, setText } from './paint.js';

const root = document.getElementById('kv');
const MOST_HEIGHT = 216;
// Low pages are given out first: beyond the highest that was in use and some more there is nothing to see.
const FEWEST_CELLS = 512;
let groups = [];

export function begin() {
  groups = [];
  root.replaceChildren();
}

export function draw({ kv }) {
  while (groups.length < kv.length) groups.push(new Group(kv.length > 1));
  groups.forEach((group, index) => kv[index] && group.draw(kv[index]));
}

class Group {
  constructor(isTitled) {
    this.title = element('h4');
    this.title.hidden = !isTitled;
    this.canvas = element('canvas', 'map');
    this.canvas.setAttribute('role', 'img');
    this.canvas.setAttribute('aria-label', 'Map of the pages; the counts below tell the same');
    this.readout = element('p', 'readout');
    this.legend = element('ul', 'legend');
    this.counts = [['held', 'used'], ['shared', 'shared'], ['cached', 'cached, can be reclaimed'], ['free', 'free']].map(([key, label]) => {
      const count = element('b');
      const item = element('li');
      item.append(element('i', `key ${key}`), count, ` ${label}`);
      this.legend.append(item);
      return count;
    });
    root.append(this.title, this.canvas, this.readout, this.legend);
    this.pointer = null;
    this.reach = FEWEST_CELLS;
    this.canvas.addEventListener('pointermove', (event) => this.point(event));
    this.canvas.addEventListener('pointerleave', () => this.point(null));
  }

  draw(kv) {
    this.kv = kv;
    const counts = [kv.total_pages - kv.free_pages - kv.cached_pages, kv.shared_pages, kv.cached_pages, kv.free_pages];
    this.counts.forEach((node, index) => setText(node, counts[index].toLocaleString('en')));
    const window = kv.window_tokens ? `window of ${kv.window_tokens} tokens` : 'all tokens';
    setText(this.title, `Layers that see ${kv.window_tokens ? `a ${window}` : window}`);

    const all = kv.runs.reduce((sum, [count]) => sum + count, kv.cells_left_out);
    const lastRun = kv.runs.at(-1);
    const used = lastRun?.[1] === 0 ? all - lastRun[0] : all;
    while (this.reach < used * 1.1) this.reach *= 2;
    const cells = Math.min(all, this.reach);
    const room = this.canvas.clientWidth;
    let size = 14;
    while (size > 2 && Math.ceil(cells / Math.floor(room / size)) * size > MOST_HEIGHT) size -= 1;
    const columns = Math.max(1, Math.floor(room / size));
    this.grid = { size, columns, cells, beyond: (all - cells) * kv.cell_pages };
    const [paint] = context(this.canvas, Math.max(1, Math.ceil(cells / columns)) * size);
    const [free, cached, ink, paper] = colours('cell-free', 'cell-cached', 'ink', 'raised');
    const gap = size >= 5 ? 1 : 0;
    let at = 0;
    for (const [count, refs, holder] of kv.runs) {
      paint.fillStyle = refs > 0 ? (holder ? sessionColour(holder) : ink) : refs < 0 ? cached : free;
      for (const end = Math.min(at + count, cells); at < end; at += 1) {
        const x = (at % columns) * size;
        const y = Math.floor(at / columns) * size;
        paint.fillRect(x, y, size - gap, size - gap);
        if (refs < 2) continue;
        const mark = Math.max(1, Math.floor(size / 2.6));
        const inset = (size - gap - mark) / 2;
        paint.fillStyle = paper;
        paint.fillRect(x + inset, y + inset, mark, mark);
        paint.fillStyle = holder ? sessionColour(holder) : ink;
      }
    }
    this.tell();
  }

  point(event) {
    this.pointer = event && { x: event.offsetX, y: event.offsetY };
    this.tell();
  }

  /** Says what the cell under the pointer holds. */
  tell() {
    const { kv, grid, pointer } = this;
    const column = pointer && Math.floor(pointer.x / grid.size);
    const cell = pointer && column < grid.columns ? Math.floor(pointer.y / grid.size) * grid.columns + column : -1;
    if (cell < 0 || cell >= grid.cells) {
      const pages = kv.cell_pages > 1 ? `A cell is ${kv.cell_pages} pages, a page ${kv.page_tokens} tokens.` : `A cell is a page of ${kv.page_tokens} tokens.`;
      const beyond = grid.beyond > 0 ? ` ${grid.beyond.toLocaleString('en')} free pages beyond these aren’t shown.` : '';
      setText(this.readout, pages + beyond);
      return;
    }
    let at = 0;
    const run = kv.runs.find(([count]) => (at += count) > cell);
    const [, refs, holder] = run ?? [0, 0, 0];
    const by = holder ? `session ${sessionName(holder)}` : 'a step in flight';
    const what = refs > 1 ? `shared by ${refs}, ${by} first` : refs === 1 ? `held by ${by}` : refs < 0 ? 'kept by the prefix cache' : 'free';
    setText(this.readout, `Page ${cell * kv.cell_pages}: ${what}.`);
  }
}
