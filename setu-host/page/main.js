// Puts the page together: the model's choice, the theme, and on narrow screens one of two views at a time.

import { request } from './api.js';
import * as chat from './chat.js';
import * as live from './live.js';
import * as settings from './settings.js';

const select = document.getElementById('model');
const narrow = matchMedia('(max-width: 60rem)');
const tabs = ['chat', 'engine'].map((name) => ({ name, tab: document.getElementById(`tab-${name}`), pane: document.getElementById(name) }));
let chosen = 'chat';

settings.start(() => {
  loadModels(false);
  live.restart();
});
chat.start(() => select.value || undefined);
startTheme();
startTabs();
live.start(() => select.value || undefined);
loadModels();
if (!narrow.matches) document.getElementById('prompt').focus();

async function loadModels(isFirst = true) {
  try {
    const { data } = await (await request('v1/models')).json();
    const before = select.value;
    select.replaceChildren(...data.map(({ id }) => new Option(id, id)));
    if (data.some(({ id }) => id === before)) select.value = before;
    select.disabled = data.length < 2;
    if (select.value !== before && before) live.restart();
  } catch (error) {
    select.replaceChildren(new Option(error.status === 401 ? 'key needed' : 'no models', ''));
    select.disabled = true;
    if (error.status === 401) settings.askForKey(isFirst);
  }
}
select.addEventListener('change', () => live.restart());

function startTheme() {
  const button = document.getElementById('theme');
  const names = { system: 'Theme: as the system', light: 'Theme: light', dark: 'Theme: dark' };
  const signs = { system: '◐', light: '○', dark: '●' };
  const order = Object.keys(names);
  const show = () => {
    const theme = globalThis.setuTheme.chosen;
    button.textContent = signs[theme];
    button.title = names[theme];
    button.setAttribute('aria-label', names[theme]);
  };
  button.addEventListener('click', () => {
    globalThis.setuTheme.chosen = order[(order.indexOf(globalThis.setuTheme.chosen) + 1) % order.length];
    show();
  });
  show();
}

function startTabs() {
  const show = () => {
    for (const { name, tab, pane } of tabs) {
      const isShown = !narrow.matches || name === chosen;
      pane.hidden = !isShown;
      tab.setAttribute('aria-selected', String(name === chosen));
      tab.tabIndex = name === chosen ? 0 : -1;
      if (narrow.matches) {
        pane.setAttribute('role', 'tabpanel');
        pane.setAttribute('aria-labelledby', tab.id);
      } else {
        pane.removeAttribute('role');
        pane.removeAttribute('aria-labelledby');
      }
    }
    // Nobody looks at what isn't shown.
    live.setShown(!document.getElementById('engine').hidden);
  };
  const choose = (name) => {
    chosen = name;
    show();
  };
  for (const { name, tab } of tabs) {
    tab.addEventListener('click', () => choose(name));
    tab.addEventListener('keydown', (event) => {
      if (event.key !== 'ArrowLeft' && event.key !== 'ArrowRight') return;
      const other = tabs.find((other) => other.name !== name);
      choose(other.name);
      other.tab.focus();
    });
  }
  narrow.addEventListener('change', show);
  show();
}
