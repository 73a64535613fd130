// The page under load, for people who haven't run it yet.

import { join } from 'node:path';
import { ask, open, set, settled } from './browser.mjs';

const TOPICS = ['a river', 'the sea', 'a mountain pass', 'an old bridge', 'the first train', 'a lighthouse'];

/** Has several clients ask at once, some with a prompt in common and some for two answers. */
function load(base, stop) {
  const common = 'You write for a magazine about bridges and the people who cross them. '.repeat(12);
  const client = async (index) => {
    for (let round = 0; !stop.signal.aborted; round += 1) {
      const messages = [{ role: 'user', content: `Write about ${TOPICS[(index + round) % TOPICS.length]}.` }];
      if (index % 2 === 0) messages.unshift({ role: 'system', content: common });
      const body = { messages, max_tokens: 120 + 40 * index, n: index % 3 === 0 ? 2 : 1, seed: index + round, ignore_eos: true, stream: true, user: index % 2 ? 'press' : 'studio' };
      const response = await fetch(`${base}v1/chat/completions`, { method: 'POST', headers: { 'content-type': 'application/json' }, body: JSON.stringify(body), signal: stop.signal });
      for await (const _ of response.body);
    }
  };
  return Promise.allSettled(TOPICS.map((_, index) => client(index)));
}

export async function take(browser, base, folder) {
  const stop = new AbortController();
  const loaded = load(base, stop);
  const { page, close } = await open(browser, base, { viewport: { width: 1440, height: 1000 }, colorScheme: 'light' });
  await set(page, { temperature: 0, max_completion_tokens: 90 });
  await ask(page, 'Why is the sky blue?');
  await page.fill('#prompt', 'And why is it red in the evening?');
  await page.press('#prompt', 'Enter');
  await page.waitForFunction(() => document.querySelectorAll('.message.assistant .body')[1]?.textContent.length > 100);
  await page.mouse.move(0, 0);
  await page.screenshot({ path: join(folder, 'desktop.png') });
  await settled(page);
  await close();

  const phone = await open(browser, base, { viewport: { width: 390, height: 844 }, deviceScaleFactor: 2, hasTouch: true, isMobile: true, colorScheme: 'dark' });
  await phone.page.click('#tab-engine');
  await phone.page.waitForTimeout(8000);
  await phone.page.screenshot({ path: join(folder, 'phone.png') });
  await phone.close();
  stop.abort();
  await loaded;
}
