// The view of the engine: takes the frames of `live` while somebody can see them, and hands them to what shows them.

import { events, request } from './api.js';
import * as components from './components.js';
import * as curves from './curves.js';
import * as pages from './pages.js';
import * as sessions from './sessions.js';
import { showDefaults } from './settings.js';
import * as timeline from './timeline.js';

const VIEWS = [curves, pages, timeline, sessions, components];
const link = document.getElementById('link');
const pause = document.getElementById('pause');
const calm = matchMedia('(prefers-reduced-motion: reduce)');
// Frames come faster than calm eyes want them.
const CALM_MS = 1000;

let model = () => undefined;
let isShown = false;
let isPaused = false;
let connection = null;
let engine = null;
let frame = null;
let drawn = 0;

export function start(chosenModel) {
  model = chosenModel;
  pause.addEventListener('click', () => setPaused(!isPaused));
  document.addEventListener('visibilitychange', follow);
  document.addEventListener('setu-theme', redraw);
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);
  new ResizeObserver(redraw).observe(document.getElementById('engine'));
  timeline.start(() => setPaused(true), () => setPaused(false));
  follow();
}

export function setShown(shown) {
  isShown = shown;
  follow();
}

/** Connects anew, with another key or for another model. */
export function restart() {
  connection?.abort();
  connection = null;
  follow();
}

/** Looks while somebody can see it. */
function follow() {
  const wanted = isShown && document.visibilityState === 'visible';
  if (wanted && !connection) {
    connection = new AbortController();
    look(connection);
  } else if (!wanted && connection) {
    connection.abort();
    connection = null;
    tell('off', 'not watching');
  }
}

async function look(controller) {
  const { signal } = controller;
  for (let wait = 500; !signal.aborted; wait = Math.min(wait * 2, 8000)) {
    tell('off', 'connecting');
    try {
      const response = await request(address(), { signal, accept: 'text/event-stream' });
      for await (const event of events(response)) {
        take(event);
        wait = 500;
      }
      tell('off', 'the server ended the view');
    } catch (error) {
      if (signal.aborted) return;
      tell('off', error.message);
      // Another key connects anew.
      if (error.status === 401 || error.status === 403) return;
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}

const address = () => (model() ? `live?model=${encodeURIComponent(model())}` : 'live');

function take(event) {
  switch (event.event) {
    case 'engine':
      engine = event;
      showDefaults(engine.components);
      VIEWS.forEach((view) => view.begin?.(engine));
      break;
    case 'frame':
      VIEWS.forEach((view) => view.take?.(event));
      if (isPaused) break;
      frame = event;
      tell('on', frame.viewers > 1 ? `live, ${frame.viewers} watch` : 'live');
      draw();
      break;
    case 'busy':
      tell('busy', `in one step for ${event.since_s.toFixed(0)} s`);
      break;
  }
}

function draw() {
  const now = performance.now();
  if (calm.matches && now - drawn < CALM_MS) return;
  drawn = now;
  redraw();
}

function redraw() {
  if (engine && frame && isShown) VIEWS.forEach((view) => view.draw(frame, engine));
}

function setPaused(paused) {
  if (paused === isPaused) return;
  isPaused = paused;
  pause.setAttribute('aria-pressed', String(paused));
  pause.textContent = paused ? 'Resume' : 'Pause';
  timeline.hold(paused);
  if (paused) tell('held', 'paused');
}

function tell(state, text) {
  link.dataset.state = state;
  if (link.textContent !== text) link.textContent = text;
}
