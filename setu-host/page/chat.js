// The chat: a conversation that streams, can be stopped, taken up again, and changed at its end.

import { events, refusal, request } from './api.js';
import { Rendered } from './markdown.js';
import { askForKey, pointAt, sampling, systemPrompt } from './settings.js';

const STORE = 'setu.chat';
const EXAMPLES = ['Why is the sky blue?', 'Write a haiku about a bridge.', 'Name three fruits and their colours.'];

const list = document.getElementById('messages');
const form = document.getElementById('composer');
const input = document.getElementById('prompt');
const send = document.getElementById('send');
const said = document.getElementById('said');

// What was said: {role, content, reasoning, note, error}, and what is shown of each, in the same order.
let messages = [];
let shown = [];
let running = null;
let model = () => undefined;

export function start(chosenModel) {
  model = chosenModel;
  try {
    messages = JSON.parse(sessionStorage.getItem(STORE)) ?? [];
  } catch {
    messages = [];
  }
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    if (running) running.abort();
    else submit();
  });
  input.addEventListener('input', fit);
  input.addEventListener('keydown', (event) => {
    if (event.isComposing) return;
    if (event.key === 'Enter' && !event.shiftKey) {
      event.preventDefault();
      if (!running) submit();
    } else if (event.key === 'ArrowUp' && input.value === '' && !running) {
      const last = messages.findLastIndex((message) => message.role === 'user');
      if (last >= 0) {
        event.preventDefault();
        edit(last);
      }
    }
  });
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Escape' && running) {
      event.preventDefault();
      running.abort();
    }
  });
  document.getElementById('new-chat').addEventListener('click', () => {
    running?.abort();
    messages = [];
    render();
    store();
    input.focus();
  });
  render();
  fit();
}

function submit() {
  const content = input.value.trim();
  if (!content) return;
  input.value = '';
  fit();
  messages.push({ role: 'user', content });
  answer();
}

/** Has the conversation as it stands answered. */
async function answer() {
  // What failed before it said anything is no part of the conversation.
  const asked = messages.filter(({ role, content }) => role === 'user' || content).map(({ role, content }) => ({ role, content }));
  const system = systemPrompt();
  if (system) asked.unshift({ role: 'system', content: system });
  const message = { role: 'assistant', content: '', reasoning: '', note: '', error: '' };
  messages.push(message);
  const controller = new AbortController();
  running = controller;
  busy(true);
  render();
  list.scrollTop = list.scrollHeight;
  const timing = { sent: performance.now(), first: null, last: null };
  let finish = null;
  let usage = null;
  try {
    const body = { model: model(), messages: asked, ...sampling(), stream: true, stream_options: { include_usage: true } };
    const response = await request('v1/chat/completions', { body, signal: controller.signal, accept: 'text/event-stream' });
    for await (const event of events(response)) {
      if (event.error) throw refusal(event.error);
      usage = event.usage ?? usage;
      const choice = event.choices?.[0];
      finish = choice?.finish_reason ?? finish;
      const { content = '', reasoning_content: reasoning = '' } = choice?.delta ?? {};
      if (!content && !reasoning) continue;
      timing.last = performance.now();
      timing.first ??= timing.last;
      message.content += content ?? '';
      message.reasoning += reasoning ?? '';
      later(message);
    }
    message.note = note({ finish, usage, timing });
    say(`Answer complete. ${message.note}`);
  } catch (error) {
    if (error.name === 'AbortError') {
      message.note = note({ finish: 'stopped', usage, timing });
      say('Stopped.');
    } else {
      failed(message, error);
    }
  } finally {
    if (running === controller) {
      running = null;
      busy(false);
    }
    if (messages.includes(message)) {
      render();
      store();
    }
  }
}

function failed(message, error) {
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : '';
  message.error = `${error.message}${wait}`;
  say(`The request failed: ${message.error}`);
  if (error.status === 401) askForKey();
  else if (error.param) pointAt(error.param);
}

/** What an answer took, in a line. */
function note({ finish, usage, timing }) {
  const parts = [];
  if (finish === 'stopped') parts.push('stopped');
  if (finish === 'length') parts.push('cut off at its longest');
  if (finish === 'error') parts.push('ended by an error');
  if (usage) {
    const tokens = usage.completion_tokens;
    parts.push(`${tokens} tokens`);
    const seconds = (timing.last - timing.first) / 1000;
    if (tokens > 1 && seconds > 0) parts.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
  }
  if (timing.first !== null) parts.push(`first after ${duration(timing.first - timing.sent)}`);
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    parts.push(`${usage.prompt_tokens} in the prompt${cached ? `, ${cached} cached` : ''}`);
  }
  return parts.join(' · ');
}

const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);

// Text arrives faster than it can be seen: it is shown once a frame.
let pending = null;
function later(message) {
  if (pending) return;
  pending = requestAnimationFrame(() => {
    pending = null;
    const index = messages.indexOf(message);
    if (index < 0) return;
    const follows = list.scrollHeight - list.scrollTop - list.clientHeight < 48;
    shown[index]?.update(message);
    if (follows) list.scrollTop = list.scrollHeight;
  });
}

function busy(isBusy) {
  send.textContent = isBusy ? 'Stop' : 'Send';
  send.classList.toggle('stop', isBusy);
  list.setAttribute('aria-busy', String(isBusy));
}

/** Tells those who don't see the page; letter by letter would be too much. */
function say(text) {
  said.textContent = text;
}

function store() {
  sessionStorage.setItem(STORE, JSON.stringify(messages));
}

function fit() {
  input.style.height = 'auto';
  input.style.height = `${Math.min(input.scrollHeight + 2, 240)}px`;
}

/** Shows the conversation; messages that are as before keep their nodes. */
function render() {
  if (messages.length === 0) {
    shown = [];
    list.replaceChildren(welcome());
    return;
  }
  shown = messages.map((message, index) => {
    const view = shown[index]?.message === message ? shown[index] : new MessageView(message);
    view.update(message);
    view.actions(index);
    return view;
  });
  const follows = list.scrollHeight - list.scrollTop - list.clientHeight < 48;
  const nodes = shown.map((view) => view.element);
  if (nodes.length !== list.children.length || nodes.some((node, index) => list.children[index] !== node)) list.replaceChildren(...nodes);
  if (follows) list.scrollTop = list.scrollHeight;
}

function welcome() {
  const box = element('div', 'welcome');
  box.append(element('p', '', 'Ask something, and watch the engine answer.'));
  const examples = element('div', 'examples');
  for (const example of EXAMPLES) {
    examples.append(button(example, '', () => {
      input.value = example;
      submit();
      input.focus();
    }));
  }
  box.append(examples);
  return box;
}

class MessageView {
  constructor(message) {
    this.message = message;
    this.element = element('article', `message ${message.role}`);
    this.element.setAttribute('aria-label', message.role === 'user' ? 'You' : 'Model');
    this.body = element('div', 'body');
    this.foot = element('div', 'foot');
    this.note = element('span', 'note');
    this.buttons = element('span', 'buttons');
    this.foot.append(this.note, this.buttons);
    this.element.append(this.body, this.foot);
    this.rendered = message.role === 'assistant' ? new Rendered(this.body) : null;
  }

  update(message) {
    if (this.rendered) this.rendered.set(message.content);
    else this.body.textContent = message.content;
    const isRunning = Boolean(running) && messages.at(-1) === message;
    this.element.classList.toggle('running', isRunning && !message.error);
    if (message.reasoning) {
      if (!this.reasoning) {
        this.reasoning = element('details', 'reasoning');
        this.thoughts = element('div', 'thoughts');
        this.reasoning.append(element('summary', '', 'Reasoning'), this.thoughts);
        this.element.prepend(this.reasoning);
      }
      this.thoughts.textContent = message.reasoning;
    }
    this.note.textContent = message.note ?? '';
    if (message.error && !this.error) {
      this.error = element('p', 'error');
      this.error.setAttribute('role', 'alert');
      this.body.after(this.error);
    }
    if (this.error) this.error.textContent = message.error;
  }

  actions(index) {
    const last = messages.findLastIndex((message) => message.role === this.message.role);
    const wanted = [];
    if (!running) {
      if (this.message.role === 'assistant' && this.message.content) wanted.push(['Copy', () => copy(this.message.content)]);
      if (index === last && this.message.role === 'assistant') wanted.push([this.message.error ? 'Try again' : 'Regenerate', regenerate]);
      if (index === last && this.message.role === 'user') wanted.push(['Edit', () => edit(index)]);
    }
    if (wanted.map(([name]) => name).join() === [...this.buttons.children].map((child) => child.textContent).join()) return;
    this.buttons.replaceChildren(...wanted.map(([name, action]) => button(name, 'quiet', action)));
  }
}

/** Answers the last message anew. */
function regenerate() {
  if (running) return;
  while (messages.at(-1)?.role === 'assistant') messages.pop();
  if (messages.length > 0) answer();
  input.focus();
}

/** Changes a message of the user's and goes on from there. */
function edit(index) {
  const view = shown[index];
  const field = document.createElement('textarea');
  field.value = messages[index].content;
  field.setAttribute('aria-label', 'Edit the message');
  field.rows = Math.min(12, field.value.split('\n').length + 1);
  const close = () => {
    editor.replaceWith(view.body);
    view.foot.hidden = false;
    input.focus();
  };
  const save = () => {
    const content = field.value.trim();
    if (!content || running) return;
    close();
    messages.length = index;
    messages.push({ role: 'user', content });
    answer();
  };
  const editor = element('form', 'editor');
  const buttons = element('div', 'row');
  const submit = button('Send', 'primary', save);
  buttons.append(button('Cancel', 'quiet', close), submit);
  editor.append(field, buttons);
  editor.addEventListener('submit', (event) => event.preventDefault());
  field.addEventListener('keydown', (event) => {
    if (event.isComposing) return;
    if (event.key === 'Escape') {
      event.stopPropagation();
      close();
    } else if (event.key === 'Enter' && !event.shiftKey) {
      event.preventDefault();
      save();
    }
  });
  view.body.replaceWith(editor);
  view.foot.hidden = true;
  field.focus();
  field.setSelectionRange(field.value.length, field.value.length);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Without TLS, browsers have the older way only.
    const field = Object.assign(document.createElement('textarea'), { value: text, className: 'unseen' });
    document.body.append(field);
    field.select();
    document.execCommand('copy');
    field.remove();
  }
  say('Copied.');
}

function element(tag, className = '', text = '') {
  return Object.assign(document.createElement(tag), { className, textContent: text });
}

function button(text, className, action) {
  const node = Object.assign(document.createElement('button'), { type: 'button', className, textContent: text });
  node.addEventListener('click', action);
  return node;
}
