// Drives the page as people do: node page.mjs URL [FOLDER-FOR-SCREENSHOTS]. Says `ok` at the end.
// KEYED is the address of a server that asks for a key, and KEY is one; SMALL is one with little memory, for screenshots.

import assert from 'node:assert/strict';
import { ask, coloursIn, lastNote, launch, metric, open, set, settled, until } from './browser.mjs';

const [base, shots] = process.argv.slice(2);
const browser = await launch();

const CASES = {
  async 'a chat goes on over several turns, and says what it took'() {
    const { page, close } = await open(browser, base);
    await set(page, { temperature: 0, max_completion_tokens: 24, system: 'Answer briefly.' });
    const first = await ask(page, 'Name three fruits.');
    assert.ok(first.length > 5, first);
    const note = await lastNote(page);
    assert.match(note, /\d+ tokens · [\d.]+ tokens\/s · first after .* · \d+ in the prompt/);
    const sent = page.waitForRequest('**/v1/chat/completions');
    await ask(page, 'And one more?');
    const body = (await sent).postDataJSON();
    assert.deepEqual(body.messages.map(({ role }) => role), ['system', 'user', 'assistant', 'user']);
    assert.deepEqual([body.temperature, body.max_completion_tokens, body.top_p], [0, 24, undefined], 'what is empty isn’t sent');
    const letters = (text) => text.replace(/[^a-z]/gi, '');
    assert.equal(letters(body.messages[2].content), letters(first), 'but for its markup, what was shown');
    assert.match(await lastNote(page), /cached/, 'the second turn finds the first in the prefix cache');
    // A conversation survives a reload.
    await page.reload();
    assert.equal(await page.locator('.message').count(), 4);
    await page.click('#new-chat');
    assert.equal(await page.locator('.message').count(), 0);
    await close();
  },

  async 'an answer is stopped, asked for anew, and its question changed'() {
    const { page, close } = await open(browser, base);
    await set(page, { temperature: 0, max_completion_tokens: 6000 });
    await page.fill('#prompt', 'Tell a long story about a river and everybody who ever crossed it.');
    await page.press('#prompt', 'Enter');
    await page.waitForFunction(() => document.querySelector('.message.assistant .body').textContent.length > 40);
    assert.equal(await page.innerText('#send'), 'Stop');
    await page.keyboard.press('Escape');
    await settled(page);
    assert.match(await lastNote(page), /^stopped/);
    await until('the session ends', async () => (await metric(base, 'setu_num_requests_running')) === 0);

    await set(page, { max_completion_tokens: 8 });
    await page.click('text=Regenerate');
    await settled(page);
    assert.equal(await page.locator('.message').count(), 2);
    assert.match(await lastNote(page), /cut off at its longest · 8 tokens/);

    await page.click('.message.user >> text=Edit');
    await page.fill('.editor textarea', 'Name one bird.');
    await page.press('.editor textarea', 'Enter');
    await settled(page);
    assert.equal(await page.innerText('.message.user .body'), 'Name one bird.');
    assert.equal(await page.locator('.message').count(), 2);
    await page.press('#prompt', 'ArrowUp');
    assert.equal(await page.inputValue('.editor textarea'), 'Name one bird.');
    await page.keyboard.press('Escape');
    assert.equal(await page.locator('.editor').count(), 0);

    // The button stops as well.
    await set(page, { max_completion_tokens: 6000 });
    await page.click('text=Regenerate');
    await page.waitForFunction(() => document.querySelector('.message.assistant .body').textContent.length > 5);
    await page.click('#send');
    await settled(page);
    assert.match(await lastNote(page), /^stopped/);
    await close();
  },

  async 'what the server refuses is shown in its words, beside the setting'() {
    const { page, close } = await open(browser, base);
    await set(page, { top_p: 7 });
    await ask(page, 'Hello');
    const error = await page.innerText('.message .error');
    assert.match(error, /top_p/);
    assert.equal(await page.getAttribute('#sampling input[name="top_p"]', 'aria-invalid'), 'true');
    await page.fill('#sampling input[name="top_p"]', '');
    await page.fill('#sampling input[name="max_completion_tokens"]', '4');
    await page.click('text=Try again');
    await settled(page);
    assert.equal(await page.locator('.message .error').count(), 0);
    await close();
  },

  async 'an answer is text, whatever the model says'() {
    const answer = 'One:\n\n```html\n<b>x</b>\n```\n\n- **bold** and `code`\n- <img src=x onerror=alert(1)>\n\n<script>alert(2)</script>';
    const piece = (delta, finish_reason = null) => `data: ${JSON.stringify({ choices: [{ index: 0, delta, finish_reason }] })}\n\n`;
    const stream = [...answer].map((content) => piece({ content })).join('') + piece({}, 'stop') + 'data: [DONE]\n\n';
    const { page, close } = await open(browser, base);
    page.on('dialog', () => assert.fail('a script ran'));
    await page.route('**/v1/chat/completions', (route) => route.fulfill({ contentType: 'text/event-stream', body: stream }));
    await ask(page, 'Hello');
    const body = page.locator('.message.assistant .body');
    assert.deepEqual(await body.evaluate((body) => [body.querySelectorAll('img, script, b').length, body.querySelector('pre').textContent, body.querySelector('strong').textContent]), [0, '<b>x</b>', 'bold']);
    assert.match(await body.innerText(), /<img src=x onerror=alert\(1\)>/);
    assert.match(await body.innerText(), /<script>alert\(2\)<\/script>/);
    await close();
  },

  async 'the view follows a long stream, can be held and stepped through'() {
    const { page, close } = await open(browser, base);
    await page.waitForFunction(() => document.querySelector('#link').dataset.state === 'on');
    assert.match(await page.innerText('#components'), /fcfs[\s\S]*fixed_chunk[\s\S]*llama[\s\S]*cpu/);
    assert.ok(await page.isVisible('#no-sessions'));
    const calm = await coloursIn(page, '#kv canvas');
    await set(page, { temperature: 0, max_completion_tokens: 1800 });
    await page.fill('#prompt', 'Tell a long story about a bridge.');
    await page.press('#prompt', 'Enter');
    const state = () => page.evaluate(() => [document.querySelector('#timeline').ariaValueNow, document.querySelector('#sessions tbody')?.innerText, document.querySelector('.message.assistant .body')?.textContent.length]);
    await page.waitForFunction(() => /decoding/.test(document.querySelector('#sessions').innerText));
    assert.ok((await coloursIn(page, '#kv canvas')) > calm, 'its pages have its colour');
    assert.ok((await coloursIn(page, '#timeline')) > 3);
    assert.match(await page.innerText('#sessions-count'), /1 running, 0 waiting/);
    const before = await state();
    await until('text and view go on together', async () => {
      const after = await state();
      return Number(after[0]) > Number(before[0]) && after[1] !== before[1] && after[2] > before[2];
    });
    await until('rates and pages are told', async () => /Generated\s+[1-9]/.test(await page.innerText('#curves')) && /[1-9]\d* used/.test(await page.innerText('#kv')));

    await page.focus('#timeline');
    await page.keyboard.press('ArrowLeft');
    assert.equal(await page.innerText('#link'), 'paused');
    const chosen = await page.innerText('#step');
    assert.match(chosen, /^Step \d+: .*s/);
    await page.keyboard.press('ArrowLeft');
    assert.notEqual(await page.innerText('#step'), chosen);
    const held = await page.innerText('#step');
    await page.waitForTimeout(600);
    assert.equal(await page.innerText('#step'), held, 'a held view stays');
    assert.equal(await page.innerText('#send'), 'Stop', 'the answer goes on meanwhile');
    await page.keyboard.press('Escape');
    await page.waitForFunction(() => document.querySelector('#link').dataset.state === 'on');
    assert.equal(await page.innerText('#send'), 'Stop', 'the key resumed the view and stopped nothing');
    await page.focus('#prompt');
    await page.keyboard.press('Escape');
    await settled(page);
    await page.waitForSelector('#no-sessions:visible');
    assert.equal(await metric(base, 'setu_live_viewers'), 1);
    await close();
    await until('the view ends with its page', async () => (await metric(base, 'setu_live_viewers')) === 0);
  },

  async 'a wrong key is told, and asked for'() {
    const { KEYED: keyed, KEY: right } = process.env;
    const { page, close } = await open(browser, keyed);
    await page.waitForFunction(() => /^a key is needed/.test(document.querySelector('#link').textContent));
    assert.equal(await page.evaluate(() => document.activeElement.id), 'key');
    await page.fill('#key', 'wrong');
    await ask(page, 'Hello');
    assert.match(await page.innerText('.message .error'), /^the key isn't known here/);
    assert.equal(await page.evaluate(() => document.activeElement.id), 'key');
    await page.fill('#key', right);
    await page.keyboard.press('Enter');
    await page.waitForFunction(() => document.querySelector('#link').dataset.state === 'on');
    await page.fill('#sampling input[name="max_completion_tokens"]', '4');
    await page.click('text=Try again');
    await settled(page);
    assert.equal(await page.locator('.message .error').count(), 0);
    await page.reload();
    assert.equal(await page.inputValue('#key'), right, 'the browser keeps it');
    await set(page, { key: '' });
    assert.equal(await page.evaluate(() => localStorage.getItem('setu.key')), null);
    await close();
  },

  async 'everything is within reach of a keyboard'() {
    const { page, close } = await open(browser, base);
    await set(page, { max_completion_tokens: 4 });
    await page.waitForSelector('.card summary');
    const first = async () => {
      await page.focus('#theme');
      await page.keyboard.press('Shift+Tab');
    };
    const seen = [];
    await first();
    for (let presses = 0; presses < 40; presses += 1) {
      const focused = await page.evaluate(() => {
        const node = document.activeElement;
        if (node === document.body) return null;
        const { outlineStyle, outlineWidth } = getComputedStyle(node);
        const name = node.getAttribute('aria-label') || node.labels?.[0]?.textContent || node.textContent;
        return { id: node.id || node.className || node.tagName, name: name.trim(), visible: outlineStyle !== 'none' && parseFloat(outlineWidth) >= 1 };
      });
      if (!focused) break;
      assert.ok(focused.visible && focused.name, `${JSON.stringify(focused)} shows its focus and has a name`);
      seen.push(focused.id);
      await page.keyboard.press('Tab');
    }
    const order = ['skip', 'theme', 'settings-toggle', 'new-chat', 'messages', 'prompt', 'send', 'pause', 'timeline'];
    assert.deepEqual(seen.filter((id) => order.includes(id)).slice(0, order.length), order);

    await first();
    await page.keyboard.press('Enter');
    assert.equal(await page.evaluate(() => document.activeElement.id), 'prompt', 'the first stop leads to the message');
    await page.keyboard.type('One line');
    await page.keyboard.press('Shift+Enter');
    await page.keyboard.type('and another');
    assert.equal(await page.locator('.message').count(), 0);
    await page.keyboard.press('Enter');
    await page.waitForFunction(() => document.querySelector('#said').textContent.startsWith('Answer complete.'));
    assert.equal(await page.locator('.message.user .body').evaluate((body) => body.textContent), 'One line\nand another');
    await page.keyboard.press('Shift+Tab');
    assert.equal(await page.evaluate(() => document.activeElement.textContent), 'Regenerate');
    await page.keyboard.press('Enter');
    await page.waitForFunction(() => document.querySelector('#send').textContent === 'Send' && document.querySelector('.message.assistant .note').textContent);
    assert.equal(await page.locator('.message').count(), 2, 'regenerated');
    await close();
  },

  async 'light and dark follow the system, or the choice'() {
    const { page, close } = await open(browser, base, { colorScheme: 'dark', reducedMotion: 'reduce' });
    const background = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    const dark = await background();
    await page.emulateMedia({ colorScheme: 'light' });
    const light = await background();
    assert.notEqual(dark, light);
    await page.click('#theme');
    assert.equal(await page.getAttribute('#theme', 'aria-label'), 'Theme: light');
    await page.emulateMedia({ colorScheme: 'dark' });
    assert.equal(await background(), light, 'what was chosen holds');
    await page.click('#theme');
    await page.reload();
    assert.equal(await page.getAttribute('#theme', 'aria-label'), 'Theme: dark');
    assert.equal(await background(), dark);
    // Words stand out from what is behind them.
    for (const theme of ['dark', 'light']) {
      await page.emulateMedia({ colorScheme: theme });
      await page.evaluate(() => { globalThis.setuTheme.chosen = 'system'; });
      for (const [front, back] of [['ink', 'paper'], ['muted', 'paper'], ['muted', 'raised'], ['accent', 'raised'], ['on-accent', 'accent'], ['bad', 'raised'], ['ink', 'mine']]) {
        const ratio = await page.evaluate(contrast, [front, back]);
        assert.ok(ratio >= 4.5, `${front} on ${back}, ${theme}: ${ratio}`);
      }
    }
    await page.waitForSelector('.card summary');
    assert.equal(await page.evaluate(() => getComputedStyle(document.querySelector('.card summary'), '::before').transitionDuration), '0s');
    await close();
  },

  async 'a phone shows one view at a time, and nothing sticks out'() {
    const { page, close } = await open(browser, base, { viewport: { width: 390, height: 844 }, hasTouch: true, isMobile: true });
    const fits = async (what) => assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), `${what} fits`);
    assert.ok((await page.isVisible('#composer')) && !(await page.isVisible('#engine')));
    await until('nobody looks at what isn’t shown', async () => (await metric(base, 'setu_live_viewers')) === 0);
    await set(page, { max_completion_tokens: 6 });
    await ask(page, 'Name a fruit, and write a_very_long_word_that_has_no_place_to_be_broken_'.padEnd(200, 'x'));
    await fits('the chat');
    await page.click('#settings-toggle');
    await fits('the settings');
    await page.click('#tab-engine');
    await page.waitForFunction(() => document.querySelector('#link').dataset.state === 'on');
    assert.ok(!(await page.isVisible('#composer')));
    await fits('the engine');
    await page.focus('#tab-engine');
    await page.keyboard.press('ArrowLeft');
    assert.equal(await page.getAttribute('#tab-chat', 'aria-selected'), 'true');
    await close();
  },
};

/** Of two of the theme's colours, as WCAG counts it. */
function contrast([front, back]) {
  const context = document.createElement('canvas').getContext('2d');
  const luminance = (name) => {
    const probe = document.createElement('i');
    probe.style.color = `var(--${name})`;
    document.body.append(probe);
    context.fillStyle = getComputedStyle(probe).color;
    probe.remove();
    context.fillRect(0, 0, 1, 1);
    const [red, green, blue] = [...context.getImageData(0, 0, 1, 1).data].map((part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const [low, high] = [luminance(front), luminance(back)].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
}

try {
  for (const [name, run] of Object.entries(CASES)) {
    if (process.env.CASE && !name.includes(process.env.CASE)) continue;
    const begun = Date.now();
    await run().catch((error) => {
      throw new Error(`${name}: ${error.message}`, { cause: error });
    });
    console.log(`${name} (${((Date.now() - begun) / 1000).toFixed(1)} s)`);
  }
  if (shots) await (await import('./screenshots.mjs')).take(browser, process.env.SMALL, shots);
  console.log('ok');
} finally {
  await browser.close();
}
