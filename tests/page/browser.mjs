// A browser of its own, and pages in it that are watched for anything that goes wrong in silence.

import assert from 'node:assert/strict';
import { chromium } from 'playwright-core';

const ARGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync'];

export const launch = () => chromium.launch({ executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium', args: ARGS });

/** Opens the page as somebody who was never there before. */
export async function open(browser, base, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1440, height: 900 }, ...options });
  context.setDefaultTimeout(120_000);
  const page = await context.newPage();
  const wrong = [];
  page.on('pageerror', (error) => wrong.push(String(error)));
  page.on('console', (message) => {
    // A refusal that the page shows is an error to the console as well.
    if (message.type() === 'error' && !message.text().startsWith('Failed to load resource')) wrong.push(message.text());
  });
  page.on('request', (request) => {
    if (!request.url().startsWith(base)) wrong.push(`asks elsewhere: ${request.url()}`);
  });
  await page.goto(base);
  await page.waitForFunction(() => document.querySelector('#model').options.length > 0);
  return {
    page,
    async close() {
      assert.deepEqual(wrong, [], 'nothing goes wrong in silence');
      await context.close();
    },
  };
}

/** Sets a sampling parameter, or the system prompt or key, in the settings. */
export async function set(page, values) {
  if (await page.locator('#settings').isHidden()) await page.click('#settings-toggle');
  for (const [name, value] of Object.entries(values)) {
    await page.fill(name === 'system' || name === 'key' ? `#${name}` : `#sampling input[name="${name}"]`, String(value));
  }
  await page.click('#settings-toggle');
}

/** Sends a message and waits for the whole answer: its text. */
export async function ask(page, text) {
  const before = await page.locator('.message.assistant').count();
  await page.fill('#prompt', text);
  await page.press('#prompt', 'Enter');
  await page.waitForFunction((count) => document.querySelectorAll('.message.assistant').length > count, before);
  await settled(page);
  return page.locator('.message.assistant .body').last().innerText();
}

/** Waits until no answer runs. */
export const settled = (page) => page.waitForFunction(() => document.querySelector('#send').textContent === 'Send');

export const lastNote = (page) => page.locator('.message.assistant .note').last().innerText();

/** Waits until `check` holds. */
export async function until(what, check) {
  const begun = Date.now();
  while (!(await check())) {
    assert.ok(Date.now() - begun < 60_000, what);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

/** A value of the server's metrics, all its labels together. */
export async function metric(base, name) {
  const text = await (await fetch(`${base}metrics`)).text();
  const lines = text.split('\n').filter((line) => line.startsWith(name) && /^[ {]/.test(line.slice(name.length)));
  return lines.reduce((sum, line) => sum + Number(line.split(' ').at(-1)), 0);
}

/** Different colours in a canvas. */
export const coloursIn = (page, selector) => page.locator(selector).first().evaluate((canvas) => {
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  const found = new Set();
  for (let at = 0; at < data.length; at += 4) if (data[at + 3] === 255) found.add(`${data[at]},${data[at + 1]},${data[at + 2]}`);
  return found.size;
});
