// Who is being served: a row for each live session.

import { element, seconds, sessionColour, sessionName, setText } from './paint.js';

const table = document.getElementById('sessions');
const body = table.tBodies[0];
const count = document.getElementById('sessions-count');
const nothing = document.getElementById('no-sessions');
const rows = new Map();

// Why a session waits, for people.
const CAUSES = {
  scheduler: 'the scheduler has it wait',
  unnamed: 'the scheduler didn’t name it',
  prompt: 'another computes the prompt they share',
  in_flight: 'a step from before is still in flight',
  slots: 'all sampler slots are taken',
  batcher: 'the batcher gave it nothing',
  step_tokens: 'the step is full of tokens',
  step_sessions: 'the step is full of sessions',
  pages: 'no pages are free',
  gave_way: 'gave way to another',
};

export function begin() {
  rows.clear();
  body.replaceChildren();
}

export function draw(frame) {
  const { sessions, sessions_left_out: leftOut, totals } = frame;
  setText(count, `${totals.running} running, ${totals.waiting} waiting${leftOut ? `, ${leftOut} not shown` : ''}`);
  nothing.hidden = sessions.length > 0;
  table.hidden = sessions.length === 0;
  table.classList.toggle('one-tenant', new Set(sessions.map(({ tenant }) => tenant)).size < 2);
  const live = new Set(sessions.map(({ id }) => id));
  for (const [id, row] of rows) {
    if (live.has(id)) continue;
    row.element.remove();
    rows.delete(id);
  }
  for (const session of sessions) {
    if (!rows.has(session.id)) {
      const row = new Row(session.id);
      rows.set(session.id, row);
      body.append(row.element);
    }
    rows.get(session.id).set(session);
  }
}

class Row {
  constructor(id) {
    this.element = element('tr');
    this.swatch = element('i', 'swatch');
    const name = element('th', 'name');
    name.scope = 'row';
    name.append(this.swatch, sessionName(id));
    this.id = id;
    const cell = (className) => element('td', className);
    this.tenant = cell('tenant');
    this.state = cell('state');
    this.dot = element('i', 'dot');
    this.stateName = element('span');
    this.reason = element('small');
    this.state.append(this.dot, this.stateName, this.reason);
    this.prompt = cell('number');
    this.answer = cell('number');
    this.pages = cell('number');
    this.age = cell('number age');
    this.element.append(name, this.tenant, this.state, this.prompt, this.answer, this.pages, this.age);
  }

  set(session) {
    const { state, wait } = session;
    this.swatch.style.background = sessionColour(this.id);
    setText(this.tenant, session.tenant);
    this.dot.dataset.state = state;
    setText(this.stateName, state);
    setText(this.reason, this.why(session, wait));
    setText(this.prompt, session.cached_tokens ? `${session.prompt_tokens} (${session.cached_tokens} cached)` : `${session.prompt_tokens}`);
    setText(this.answer, `${session.generated_tokens} / ${session.max_tokens}`);
    setText(this.pages, session.pages_shared ? `${session.pages_held} (${session.pages_shared} shared)` : `${session.pages_held}`);
    setText(this.age, seconds(session.age_s));
  }

  why(session, wait) {
    if (!wait || wait.cause === 'in_flight') return session.preemptions ? `preempted ${session.preemptions} ×` : '';
    const by = wait.by ? `, ${sessionName(wait.by)}` : '';
    return wait.reason || `${CAUSES[wait.cause] ?? wait.cause}${by}`;
  }
}
