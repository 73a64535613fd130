// What the engine is made of: components in use with their settings, the time they take, and their faults.

import { element, seconds, setText } from './paint.js';

const root = document.getElementById('components');
const faults = document.getElementById('faults');
let cards = new Map();
let faultsShown = 0;

export function begin(engine) {
  cards = new Map();
  faultsShown = 0;
  faults.replaceChildren();
  root.replaceChildren();
  for (const component of engine.components) {
    const card = new Card(component);
    cards.set(component.kind, card);
    root.append(card.element);
  }
  const facts = [engine.model, `up to ${engine.max_model_len.toLocaleString('en')} tokens`, `${(engine.weight_bytes / 1e6).toFixed(0)} MB of weights`];
  const model = cards.get('model');
  if (model) setText(model.now, facts.join(' · '));
}

export function draw(frame) {
  const { totals } = frame;
  const perStep = (spent) => (totals.steps > 0 ? `${seconds(spent / totals.steps)} a step` : '');
  for (const [kind, policy] of [['scheduler', frame.scheduler], ['batcher', frame.batcher]]) {
    const card = cards.get(kind);
    if (!card) continue;
    const replaced = card.key !== policy.key;
    card.element.classList.toggle('replaced', replaced);
    setText(card.now, replaced ? `replaced by ${policy.key} · ${perStep(policy.spent_s)}` : perStep(policy.spent_s));
  }
  const backend = cards.get('backend');
  if (backend) setText(backend.now, perStep(totals.backend_s));
  const engine = cards.get('engine');
  if (engine) setText(engine.now, totals.steps > 0 ? `${perStep(totals.engine_s)} of its own, policies included` : '');
  if (frame.faults.length === faultsShown) return;
  faultsShown = frame.faults.length;
  faults.replaceChildren(...frame.faults.map((fault) => element('li', 'error', `${fault.kind} ${fault.component}, step ${fault.step}: ${fault.message}`)));
}

class Card {
  constructor({ kind, key, description, source, settings }) {
    this.key = key;
    this.element = element('details', 'card');
    const summary = element('summary');
    const title = element('span', 'title');
    title.append(element('span', 'kind', kind));
    if (key) title.append(element('b', '', key));
    this.now = element('span', 'now');
    summary.append(title, this.now);
    const list = element('dl');
    for (const { name, value, unit, help, origin } of settings) {
      const term = element('dt', '', name);
      term.title = help;
      const definition = element('dd', origin === 'default' ? '' : 'given');
      definition.append(value === null ? 'unset' : `${value}${unit && value !== null ? ` ${unit}` : ''}`);
      if (origin !== 'default') definition.append(element('small', '', origin));
      list.append(term, definition);
    }
    const about = [description, source].filter(Boolean).join(' · ');
    this.element.append(summary, element('p', 'about', about));
    if (settings.length > 0) this.element.append(list);
  }
}
