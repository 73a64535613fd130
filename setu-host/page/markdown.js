// A small part of Markdown, as DOM nodes. A model's answer is text and never becomes HTML: what isn't known here stays
// as it was written.

const INLINE = /(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)|\*\*(?=\S)([\s\S]*?\S)\*\*|(?<![\w*])\*(?=[^\s*])([^*\n]*[^\s*])\*(?![\w*])|(?<!\w)_(?=[^\s_])([^_\n]*[^\s_])_(?!\w)/;

/** Shows a text that grows: blocks that are as before keep their nodes. */
export class Rendered {
  constructor(element) {
    this.element = element;
    this.sources = [];
  }

  set(text) {
    const blocks = split(text);
    blocks.forEach((block, index) => {
      const source = JSON.stringify(block);
      if (this.sources[index] === source) return;
      const node = render(block);
      const old = this.element.childNodes[index];
      if (old) old.replaceWith(node);
      else this.element.append(node);
      this.sources[index] = source;
    });
    while (this.element.childNodes.length > blocks.length) this.element.lastChild.remove();
    this.sources.length = blocks.length;
  }
}

/** The blocks of a text: code, headings, lists, quotes, rules and paragraphs. */
export function split(text) {
  const lines = text.split('\n');
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    const line = lines[at];
    const fence = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)\s*$/.exec(line);
    if (fence) {
      const closes = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
      let end = at + 1;
      while (end < lines.length && !closes.test(lines[end])) end += 1;
      blocks.push({ kind: 'code', language: fence[2], text: lines.slice(at + 1, end).join('\n') });
      at = end + 1;
      continue;
    }
    const heading = /^(#{1,6})\s+(.*?)\s*#*$/.exec(line);
    if (heading) {
      blocks.push({ kind: 'heading', level: heading[1].length, text: heading[2] });
      at += 1;
    } else if (/^ {0,3}([-*_])( *\1){2,} *$/.test(line)) {
      blocks.push({ kind: 'rule' });
      at += 1;
    } else if (item(line)) {
      const ordered = item(line).ordered;
      const list = { kind: 'list', ordered, start: item(line).number, items: [] };
      for (; at < lines.length && lines[at].trim() !== ''; at += 1) {
        const next = item(lines[at]);
        if (next && next.indent < 2 && next.ordered !== ordered) break;
        if (next && next.indent < 2) list.items.push(next.text);
        else list.items[list.items.length - 1] += `\n${lines[at].trim()}`;
      }
      // A blank line between two items doesn't end the list.
      const last = blocks.at(-1);
      if (last?.kind === 'list' && last.ordered === ordered && last.open) last.items.push(...list.items);
      else blocks.push(list);
      blocks.at(-1).open = true;
      continue;
    } else if (/^ {0,3}>/.test(line)) {
      const quoted = [];
      for (; at < lines.length && /^ {0,3}>/.test(lines[at]); at += 1) quoted.push(lines[at].replace(/^ {0,3}> ?/, ''));
      blocks.push({ kind: 'quote', text: quoted.join('\n') });
    } else if (line.trim() === '') {
      at += 1;
      continue;
    } else {
      const paragraph = [];
      const ends = (text) => text.trim() === '' || /^ {0,3}(`{3,}|~{3,}|>|#{1,6}\s)/.test(text) || item(text);
      do paragraph.push(lines[at++]);
      while (at < lines.length && !ends(lines[at]));
      blocks.push({ kind: 'paragraph', text: paragraph.join('\n') });
    }
    if (blocks.at(-2)?.open) delete blocks.at(-2).open;
  }
  return blocks;
}

function item(line) {
  const match = /^(\s*)(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/.exec(line);
  return match && { indent: match[1].length, ordered: match[3] !== undefined, number: Number(match[3] ?? 1), text: match[4] };
}

function render(block) {
  const make = (tag, text) => {
    const node = document.createElement(tag);
    inline(node, text);
    return node;
  };
  switch (block.kind) {
    case 'code': {
      const pre = document.createElement('pre');
      const code = document.createElement('code');
      code.textContent = block.text;
      if (block.language) pre.dataset.language = block.language;
      pre.tabIndex = 0;
      pre.append(code);
      return pre;
    }
    // The page's own headings come first.
    case 'heading': return make(`h${Math.min(block.level + 3, 6)}`, block.text);
    case 'rule': return document.createElement('hr');
    case 'quote': return make('blockquote', block.text);
    case 'list': {
      const list = document.createElement(block.ordered ? 'ol' : 'ul');
      if (block.ordered && block.start !== 1) list.start = block.start;
      list.append(...block.items.map((text) => make('li', text)));
      return list;
    }
    default: return make('p', block.text);
  }
}

function inline(parent, text) {
  for (let rest = text; rest; ) {
    const match = INLINE.exec(rest);
    if (!match) {
      parent.append(rest);
      return;
    }
    if (match.index > 0) parent.append(rest.slice(0, match.index));
    const [whole, , code, bold, star, under] = match;
    const node = document.createElement(code !== undefined ? 'code' : bold !== undefined ? 'strong' : 'em');
    if (code !== undefined) node.textContent = code.trim() || code;
    else inline(node, bold ?? star ?? under);
    parent.append(node);
    rest = rest.slice(match.index + whole.length);
  }
}
