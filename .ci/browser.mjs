// The dashboard in a real browser, against a real service. Called by a test of test_chronotask.py:
//     node .ci/browser.mjs PYTHON CHRONOTASK.PY FOLDER NODE_MODULES [PATTERN]
// NODE_MODULES holds playwright-core and axe-core; FOLDER gets the database and a screenshot of each view.
// Prints `ok NAME` or `FAILED NAME` for each fact; the exit status is 0 when all hold.

import { spawn, execFileSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import http from 'node:http';
import { createRequire } from 'node:module';
import net from 'node:net';
import { join } from 'node:path';

const [python, program, folder, modules, pattern = ''] = process.argv.slice(2);
const require = createRequire(join(modules, 'x.js'));
const { chromium } = require('playwright-core');
const axe = readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8');
const browserPath = ['/usr/bin/chromium', '/usr/bin/chromium-browser', '/usr/bin/google-chrome'].find(path => existsSync(path));
// Without the background-networking flags Chromium looks up its maker's hosts at every start.
const FLAGS = ['--no-sandbox', '--headless', '--disable-gpu', '--disable-background-networking', '--disable-quic', '--no-first-run', '--disable-component-update', '--disable-sync', '--host-resolver-rules=MAP evil.test 127.0.0.1'];
const sleep = seconds => new Promise(done => setTimeout(done, seconds * 1000));

function equal(found, wanted, what = '') {
  const [a, b] = [JSON.stringify(found), JSON.stringify(wanted)];
  if (a !== b) throw Error(`${what} expected ${b}, found ${a}`);
}
function holds(condition, what) { if (!condition) throw Error(what); }
async function until(check, what, seconds = 15) {
  for (const end = Date.now() + seconds * 1000; ;) {
    const found = await check();
    if (found) return found;
    if (Date.now() > end) throw Error(`not within ${seconds} s: ${what}`);
    await sleep(0.05);
  }
}

// ---- The service

async function freePort() {
  const server = net.createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address();
  await new Promise(done => server.close(done));
  return port;
}
class Service {
  constructor(port, name, environ = {}) { Object.assign(this, { port, name, environ, base: `http://127.0.0.1:${port}` }); }
  async start() {
    const env = { PATH: process.env.PATH, HOME: folder, CHRONOTASK_DATABASE_URL: `sqlite:///${join(folder, this.name + '.db')}`, ...this.environ };
    this.process = spawn(python, [program, '--port', String(this.port)], { env, stdio: ['ignore', 'ignore', 'inherit'] });
    await until(() => fetch(this.base + '/health').then(answer => answer.ok, () => false), 'the service is up', 20);
    return this;
  }
  async stop(signal = 'SIGTERM') {
    if (this.process.exitCode !== null || this.process.signalCode !== null) return;
    const over = once(this.process, 'exit');
    this.process.kill('SIGCONT');
    this.process.kill(signal);
    await over;
  }
  async ask(method, path, body) {
    const token = this.environ.CHRONOTASK_API_TOKEN;
    const headers = { ...(body && { 'Content-Type': 'application/json' }), ...(token && { Authorization: 'Bearer ' + token }) };
    const answer = await fetch(this.base + '/api/v1' + path, { method, headers, body: body && JSON.stringify(body) });
    const found = answer.status === 204 ? null : await answer.json();
    if (!answer.ok) throw Error(`${method} ${path}: ${answer.status} ${JSON.stringify(found)}`);
    return found;
  }
  async bash(name, command, more = {}) { return (await this.ask('POST', '/tasks', { name, task_type: 'bash', config: { command }, max_retries: 0, ...more })).id; }
  async run(id, wait = 10) { return this.ask('POST', `/tasks/${id}/execute?wait=${wait}`); }
}

// ---- The browser

let context, page, complaints = [];
function watch(tab) {
  tab.on('console', message => { if (['error', 'warning'].includes(message.type())) complaints.push(message.text()); });
  tab.on('pageerror', error => complaints.push(String(error)));
  tab.on('dialog', dialog => dialog.accept());
  return tab;
}
// What the browser says by itself about an answer that a test asked for, such as a 422.
const forgive = text => { complaints = complaints.filter(complaint => !(complaint.startsWith('Failed to load resource') && complaint.includes(text))); };
const open = async (service, hash = '#/') => { await page.goto('about:blank'); await page.goto(service.base + '/' + hash); await page.waitForFunction(() => document.querySelector('#link.live') && !/Loading/.test(document.querySelector('h1')?.textContent || 'Loading')); };
const text = selector => page.locator(selector).first().innerText();
const sees = (wanted, seconds) => until(async () => (await page.locator('body').innerText()).includes(wanted), `the page shows “${wanted}”`, seconds);
const button = (name, exact = true) => page.getByRole('button', { name, exact });
const sure = label => page.getByRole('dialog').getByRole('button', { name: label, exact: true }).click();
const more = async label => { await page.locator('.top summary', { hasText: 'More' }).click(); await page.locator('.menu[open]').getByText(label, { exact: true }).click(); };
const rows = (table, text) => page.getByRole('table', { name: table }).locator('tbody tr', text && { hasText: text });
const shot = name => page.screenshot({ path: join(folder, 'shots', name + '.png'), fullPage: true });

// Presses Tab until the wanted element has the focus: what a keyboard cannot reach fails here.
async function tabTo(selector) {
  for (let i = 0; i < 80; i++) {
    if (await page.evaluate(wanted => document.activeElement?.matches(wanted), selector)) return;
    await page.keyboard.press('Tab');
  }
  throw Error(`the keyboard does not reach ${selector}`);
}
async function axeFinds(where, runOnly = ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']) {
  if (!await page.evaluate(() => Boolean(window.axe))) await page.evaluate(axe);
  const found = await page.evaluate(runOnly => window.axe.run(document, { runOnly, resultTypes: ['violations'] }), runOnly);
  const violations = found.violations.map(v => `${v.id}: ${v.nodes.slice(0, 3).map(n => n.html.slice(0, 160)).join(' | ')}`);
  if (violations.length) throw Error(`axe on ${where}:\n    ${violations.join('\n    ')}`);
}

// ---- The facts

const facts = [];
const fact = (name, check) => facts.push([name, check]);
let service;

fact('an empty service says what to do first', async () => {
  await open(service);
  equal(await text('h1'), 'No tasks yet');
  await axeFinds('the empty list');
  await shot('empty');
});

fact('a task and its first schedule are made in one form with the keyboard alone', async () => {
  await tabTo('main a[href="./#/tasks/new"]');
  await page.keyboard.press('Enter');
  await sees('New task');
  await tabTo('input[name=name]');
  await page.keyboard.type('Say hello');
  await tabTo('[name="config.command"]');
  await page.keyboard.type('echo "hello from execution $CHRONOTASK_EXECUTION_ID"; echo oops >&2');
  await tabTo('input[name="schedules[0].schedule_type"]');
  await page.keyboard.press('ArrowRight');
  await page.keyboard.press('ArrowRight');
  equal(await page.evaluate(() => document.activeElement.value), 'interval', 'the chosen type');
  equal(await page.locator('[name^="schedules[0].schedule_config"]:visible').evaluateAll(nodes => nodes.map(node => node.name.split('.').pop())), ['seconds', 'start_date', 'timezone'], 'the fields of an interval');
  await tabTo('[name="schedules[0].schedule_config.seconds"]');
  await page.keyboard.type('1');
  await page.keyboard.press('Tab');
  await page.keyboard.type('sec');
  await until(async () => await page.locator('#preview li').count() === 5, 'the next five slots while typing');
  await until(async () => (await text('#preview')).startsWith('Every second'), 'the schedule in words');
  await axeFinds('the form of a task with its schedule');
  await page.keyboard.press('Control+Enter');
  await until(async () => await text('h1') === 'Say hello', 'the page of the new task');
  holds(await page.evaluate(() => document.activeElement.tagName === 'H1'), 'the new page has the focus');
  equal((await service.ask('GET', '/schedules')).schedules[0].schedule_config.seconds, 1);
  forgive('422'); // a preview of what was not yet typed
});

fact('its runs appear live, without asking again and again', async () => {
  const asked = [];
  const note = request => asked.push(request.url());
  await sleep(0.5);
  page.on('request', note);
  await until(async () => await rows('Executions').count() >= 3, 'three runs');
  const next = () => page.locator('.stats time').last().getAttribute('datetime');
  const before = await next();
  await until(async () => await next() !== before, 'what is next moves on');
  page.off('request', note);
  equal(asked, [], 'requests while connected');
});

fact('the output of a run opens with the keyboard', async () => {
  await tabTo('#history a');
  await page.keyboard.press('Enter');
  await sees('Standard output');
  await sees('hello from execution');
  await sees('oops');
  await axeFinds('an execution');
  await shot('execution');
});

fact('a schedule and a task are paused and resumed', async () => {
  await open(service, '#/tasks/1');
  await page.locator('#plans button', { hasText: 'Pause' }).click();
  await sees('No next run.');
  equal((await service.ask('GET', '/schedules/1')).is_active, false);
  await until(async () => (await text('.stats')).endsWith('Next run\n–'), 'neither has the task');
  await page.locator('#plans button', { hasText: 'Resume' }).click();
  await until(async () => (await service.ask('GET', '/schedules/1')).is_active, 'active again');
  await page.locator('.top button', { hasText: 'Pause' }).first().click();
  await until(async () => (await text('.top')).includes('paused'), 'the mark of a paused task');
  equal((await service.ask('GET', '/tasks/1')).status, 'paused');
  await until(async () => (await text('#plans')).includes('No next run.'), 'its schedule has no next run');
});

fact('all schedules are paused after a question, and a banner says so on every view', async () => {
  await open(service);
  await more('Pause all schedules…');
  await sees('Nothing fires until they are resumed');
  await axeFinds('the question before all is paused');
  await shot('question');
  await sure('No, go back');
  equal((await service.ask('GET', '/scheduler/status')).paused, false, 'after a no');
  const hourly = await service.bash('Hourly', 'true', { schedules: [{ schedule_type: 'interval', schedule_config: { seconds: 3600 } }] });
  const nextOfHourly = wanted => until(async () => wanted.test(await rows('Tasks', 'Hourly').locator('[data-label=Next]').innerText()), `the next run is ${wanted}`);
  await nextOfHourly(/^in \d+ min/);
  await more('Pause all schedules…');
  await sure('Pause all');
  await nextOfHourly(/–/);
  const banner = page.getByRole('status', { name: 'Firing is paused' });
  for (const hash of ['#/', '#/executions', '#/upcoming', '#/changes', '#/tasks/1', '#/tasks/new']) {
    await open(service, hash);
    await banner.waitFor({ timeout: 5000 });
  }
  await axeFinds('a view with the banner');
  await shot('paused');
  equal((await service.ask('GET', '/scheduler/status')).paused, true);
  await open(service);
  await button('Resume all schedules').click();
  await banner.waitFor({ state: 'detached' });
  await nextOfHourly(/^in \d+ min/);
  await service.ask('DELETE', '/tasks/' + hourly);
  equal((await service.ask('GET', '/scheduler/status')).paused, false);
});

fact('a long run shows its output as it comes, and is cancelled', async () => {
  const id = await service.bash('Long one', 'for i in $(seq 600); do echo "line $i"; sleep 0.1; done');
  await open(service);
  await page.getByRole('button', { name: 'Run now: Long one' }).click();
  await until(async () => (await page.locator('#running').innerText().catch(() => '')).includes('Long one'), 'it is in “Running now”');
  await shot('running');
  await page.locator('#running a', { hasText: 'Execution' }).click();
  const first = await until(async () => (await page.locator('#tail').textContent()).match(/line \d+\n/g)?.length, 'the first lines');
  await until(async () => (await page.locator('#tail').textContent()).match(/line \d+\n/g).length > first + 3, 'further lines');
  await axeFinds('a running execution');
  await shot('live-output');
  await button('Cancel…').click();
  await sees('Its processes get SIGTERM');
  await sure('Cancel it');
  await until(async () => (await text('.top')).includes('cancelled'), 'its status');
  await sees('line 1\n');
  equal((await service.ask('GET', `/executions?task_id=${id}`)).executions[0].status, 'cancelled');
});

fact('what fails comes first, with the reason, and goes when it succeeds', async () => {
  const flag = join(folder, 'flag');
  const id = await service.bash('Shaky', `test -e ${flag} || { echo "no flag today" >&2; exit 3; }`);
  await open(service);
  await service.run(id);
  await until(async () => await text('h1') === '1 task needs attention', 'the headline');
  await until(async () => (await text('#attention')).includes('no flag today'), 'the reason');
  await service.run(id);
  await until(async () => /failing since \d\d:\d\d, 2 runs in a row/.test(await text('#attention')), 'since when, and how often');
  await open(service);
  equal(await text('h1'), '1 task needs attention');
  await until(async () => (await text('#attention')).includes('no flag today'), 'the reason, from before this visit');
  await page.getByRole('link', { name: '1failing' }).or(page.getByRole('link', { name: '1 failing' })).click();
  await until(async () => await rows('Tasks').count() === 1, 'the tile leads to those that fail');
  await open(service);
  await shot('failing');
  execFileSync('touch', [flag]);
  await page.getByRole('button', { name: 'Run now: Shaky' }).first().click();
  await until(async () => await text('#attention').then(found => found.includes('succeeded'), () => true), 'it recovers');
  await page.mouse.move(5, 5);
  await page.evaluate(() => document.activeElement.blur());
  await until(async () => await page.locator('#attention').count() === 0, 'the list of failures goes');
});

fact('rows stay where they are while someone points at them', async () => {
  const [a, b] = [await service.bash('Held A', 'sleep 1.2'), await service.bash('Held B', 'sleep 60')];
  await open(service);
  await service.run(a, 0);
  await service.run(b, 0);
  const row = page.locator('#running li', { hasText: 'Held B' });
  await row.waitFor();
  await row.hover();
  const before = await row.boundingBox();
  await until(async () => (await text('#running')).includes('succeeded'), 'A ends');
  await sleep(0.4);
  equal((await row.boundingBox()).y, before.y, 'its place');
  await page.mouse.move(5, 5);
  await until(async () => !(await text('#running')).includes('Held A'), 'A goes when nobody points there');
  await row.getByRole('button').click();
  await sure('Cancel it');
  await page.mouse.move(...Object.values(await row.boundingBox()).slice(0, 2).map(n => n + 9));
  await until(async () => (await service.ask('GET', `/executions?task_id=${b}`)).executions[0].status === 'cancelled', 'B is cancelled');
  await page.mouse.move(5, 5);
  await page.evaluate(() => document.activeElement.blur());
  await until(async () => await page.locator('#running').count() === 0, 'B goes');
});

fact('search and filters are in the URL and survive a reload', async () => {
  await service.ask('POST', '/tasks', { name: 'Ask the weather', task_type: 'http', config: { url: service.base + '/health' } });
  await open(service);
  const search = page.getByRole('searchbox', { name: 'Search tasks' });
  holds((await search.boundingBox()).y < 200, 'the search is beside the title');
  await page.keyboard.press('/');
  holds(await search.evaluate(node => node === document.activeElement), '/ goes to the search');
  await page.keyboard.type('weather');
  await page.getByLabel('Type', { exact: true }).selectOption('http');
  await until(async () => await rows('Tasks').count() === 1, 'one row');
  equal(new URL(page.url()).hash, '#/?q=weather&type=http');
  await page.reload();
  await until(async () => await rows('Tasks').count() === 1, 'one row after a reload');
  equal(await search.inputValue(), 'weather');
  equal(await page.getByLabel('Type', { exact: true }).inputValue(), 'http');
  await rows('Tasks').getByRole('link').click();
  await until(async () => await text('h1') === 'Ask the weather', 'the task');
  await page.locator('nav a', { hasText: 'Tasks' }).click();
  await until(async () => await rows('Tasks').count() === 1, 'one row on the way back');
  const fails = await service.bash('Fails', 'exit 1');
  await service.run(fails);
  await page.locator('#attention').waitFor();
  await page.getByLabel('Type', { exact: true }).selectOption('');
  await search.fill('Fails');
  const top = async node => (await node.boundingBox())?.y;
  await until(async () => await top(rows('Tasks', 'Fails')) < await top(page.locator('#attention')), 'what is found is above what needs attention');
  await service.ask('DELETE', '/tasks/' + fails);
  await search.fill('nothing like it');
  await sees('No task matches.');
  await page.getByRole('link', { name: 'Clear the filters' }).click();
  await until(async () => await rows('Tasks').count() > 1, 'all rows');
  equal(await search.inputValue(), '');
  await page.getByLabel('Status', { exact: true }).selectOption('paused');
  await until(async () => await rows('Tasks', 'Say hello').count() === 1 && await rows('Tasks').count() === 1, 'the paused one');
});

fact('forms say what is wrong beside the field, and keep what nobody touched', async () => {
  await open(service, '#/tasks/1/schedules/new');
  const field = page.getByLabel('Cron expression');
  await field.fill('*/90 * * * *');
  await until(async () => (await text('#preview')).includes('every 90 minutes is an interval of 5400 s'), 'the preview says what it probably does not mean');
  equal(await field.getAttribute('aria-invalid'), null, 'nothing is red while one types');
  await field.fill('61 * * * *');
  await until(async () => (await text('#preview')).includes('minute'), 'the preview says why');
  await page.keyboard.press('Tab');
  await until(async () => await field.getAttribute('aria-invalid') === 'true', 'the field is marked once it is left');
  await field.fill('62 * * * *');
  await button('Save').click();
  await until(async () => await field.getAttribute('aria-invalid') === 'true', 'the field is marked');
  holds((await text('.grid .wrong:not(:empty)')).includes('0 to 59'), 'the message');
  await until(() => field.evaluate(node => node === document.activeElement), 'the field has the focus');
  await axeFinds('a form with an error');
  await shot('form-error');
  await page.getByRole('link', { name: 'Cancel' }).click();
  await sees('What was filled in here is lost.');
  await sure('No, go back');
  equal(await field.inputValue(), '62 * * * *', 'what was typed is still there');
  holds(page.url().endsWith('/schedules/new'), 'the address is that of the form');
  await page.getByRole('link', { name: 'Cancel' }).click();
  await sure('Leave');
  await until(async () => await text('h1') === 'Say hello', 'the form is left');
  await open(service, '#/tasks/new');
  equal(await page.locator('.wrong:not(:empty)').count(), 0, 'red from the start');
  await page.getByText('Arguments, environment, timeout').click();
  equal(await page.getByLabel('Give up after').first().getAttribute('placeholder'), '5', 'the default of the service, in minutes');
  holds((await page.locator('main').innerText()).includes('Default: 5 min.'), 'the default in words');
  await page.getByText('If it fails').click();
  equal(await page.getByLabel('Retries').getAttribute('placeholder'), '3');
  await page.getByLabel('Name').fill('No timeout');
  await page.getByRole('textbox', { name: 'Command *' }).fill('true');
  await page.getByLabel('Give up after').first().fill('soon');
  await page.getByLabel('Retries').fill('1.5');
  await page.keyboard.press('Tab');
  const wrong = page.locator('.wrong:visible:not(:empty)');
  await until(async () => await wrong.count() === 2, 'what is wrong, at the fields that were left');
  equal(await wrong.allInnerTexts(), ['must be a number', 'must be a whole number']);
  await page.getByLabel('Retries').fill('1');
  await button('Save').click();
  await until(async () => await page.locator('.wrong:visible:not(:empty)').count() === 1, 'one message');
  holds((await text('[data-when="task_type=bash"] .wrong:not(:empty)')).includes('number'), 'the message, beside the field of this type');
  forgive('422');
  const config = { url: service.base + '/health', method: 'POST', headers: { 'X-One': 'a: b', Authorization: 'Bearer secret' }, params: { n: 5, list: ['x', 'y'] }, body: { deep: [1, { two: null }] }, auth: { username: 'me', password: 'hidden' }, expected_status: [204, '200-299'], timeout: 7.5, verify_tls: false };
  const { id } = await service.ask('POST', '/tasks', { name: 'All fields', description: 'Some words', task_type: 'http', config, max_retries: 7, retry_delay: 0.5 });
  const before = await service.ask('GET', '/tasks/' + id);
  await open(service, `#/tasks/${id}/edit`);
  await axeFinds('the form of a task');
  await shot('form-http');
  await page.locator('[name=name]').fill('All fields, renamed');
  await button('Save').click();
  await until(async () => await text('h1') === 'All fields, renamed', 'saved');
  const { updated_at, name, ...after } = await service.ask('GET', '/tasks/' + id);
  const { follow_redirects, ...rest } = after.config;
  equal([name, { ...after, config: rest }], ['All fields, renamed', (({ updated_at: _, name: __, ...old }) => old)(before)]);
  equal(follow_redirects ?? true, true);
});

fact('an edit changes what was touched, a unit alone too; what was changed elsewhere meanwhile stays', async () => {
  const { id, schedules: [schedule] } = await service.ask('POST', '/tasks', { name: 'Of two', task_type: 'bash', config: { command: 'true', timeout: 120 }, schedules: [{ schedule_type: 'interval', schedule_config: { seconds: 7200 } }] });
  await open(service, `#/tasks/${id}/edit`);
  await service.ask('PATCH', '/tasks/' + id, { status: 'paused', max_retries: 7 });
  if (!await page.getByLabel('Give up after').first().isVisible()) await page.getByText('Arguments, environment, timeout').click();
  await page.getByLabel('Unit of time').locator('visible=true').first().selectOption('hours');
  await button('Save').click();
  await until(async () => await text('h1') === 'Of two', 'saved');
  const { status, max_retries: retries, config } = await service.ask('GET', '/tasks/' + id);
  equal([status, retries, config], ['paused', 7, { command: 'true', timeout: 7200 }]);
  await open(service, '#/schedules/' + schedule.id);
  await service.ask('PATCH', '/schedules/' + schedule.id, { is_active: false, overlap: 'queue' });
  await page.getByLabel('Unit of time').locator('visible=true').first().selectOption('minutes');
  await until(async () => (await text('#preview')).startsWith('Every 2 minutes'), 'the preview of the other unit');
  await button('Save').click();
  await until(async () => await text('h1') === 'Of two', 'saved, too');
  const after = await service.ask('GET', '/schedules/' + schedule.id);
  equal([after.is_active, after.overlap, after.schedule_config.seconds], [false, 'queue', 120]);
  // What is emptied has its default again.
  await service.ask('PATCH', '/schedules/' + schedule.id, { schedule_type: 'cron', schedule_config: { expression: '0 5 * * *', timezone: 'Asia/Tokyo' }, exclude: ['2030-12-24'], jitter: 60, max_runs: 3 });
  await open(service, '#/schedules/' + schedule.id);
  for (const label of ['Time zone', 'Not on these days', 'Spread the starts over', 'Runs at most']) await page.getByLabel(label, { exact: true }).locator('visible=true').fill('');
  await button('Save').click();
  await until(async () => await text('h1') === 'Of two', 'saved with defaults');
  const emptied = await service.ask('GET', '/schedules/' + schedule.id);
  equal([emptied.schedule_config.timezone, emptied.exclude, emptied.jitter, emptied.max_runs], ['UTC', [], 0, null]);
  await service.ask('PATCH', '/tasks/' + id, { config: { command: 'echo', args: ['--full'] } });
  await open(service, `#/tasks/${id}/run`);
  await page.getByLabel('Arguments', { exact: true }).fill('');
  await button('Run').click();
  await sees('Standard output');
  const [{ config: own }] = (await service.ask('GET', '/executions?task_id=' + id)).executions;
  equal(own, { args: null }, 'what this run alone has');
  await service.ask('DELETE', '/tasks/' + id);
});

fact('what does not fit into a line, or only looks like a number, comes back from an edit as it was', async () => {
  const config = { command: 'true', args: ['--x', '', 'a\nb'], env: { A: ' two\nlines', B: 'c:d' } };
  const { id } = await service.ask('POST', '/tasks', { name: 'Odd', task_type: 'bash', config });
  await open(service, `#/tasks/${id}/edit`);
  for (const label of ['Arguments', 'Environment']) {
    const field = page.getByLabel(label, { exact: true });
    await field.fill((await field.inputValue()).replace('two', 'three').replace('--x', '--y'));
  }
  await button('Save').click();
  await until(async () => await text('h1') === 'Odd', 'saved');
  equal((await service.ask('GET', '/tasks/' + id)).config, { ...config, args: ['--y', '', 'a\nb'], env: { A: ' three\nlines', B: 'c:d' } });
  const http = { url: 'https://example.org/', headers: { 'X-A': 'b=c: d' }, params: { 'a:b': '007', n: 5, t: true, l: [1, 'x'] } };
  await service.ask('PATCH', '/tasks/' + id, { task_type: 'http', config: http });
  await open(service, `#/tasks/${id}/edit`);
  for (const label of ['Query parameters', 'Headers']) {
    const field = page.getByLabel(label, { exact: true });
    await field.fill(await field.inputValue() + '\n');
  }
  await button('Save').click();
  await until(async () => await text('h1') === 'Odd', 'saved again');
  equal((await service.ask('GET', '/tasks/' + id)).config, http);
  await service.ask('DELETE', '/tasks/' + id);
});

fact('a time in a zone that this browser does not know yet is told in its own', async () => {
  await open(service, '#/executions');
  const [own, zoned] = await page.evaluate("[[], ['Mars/Phobos']].map(zone => when('2026-01-01T00:00:00Z', ...zone))");
  equal(zoned, own);
});

fact('a page that stays open for weeks keeps a bounded number of runs', async () => {
  const { id } = await service.ask('POST', '/tasks', { name: 'Often', task_type: 'bash', config: { command: 'true' } });
  await open(service, '#/executions?task_id=' + id);
  for (let i = 0; i < 104; i++) {
    await service.ask('POST', `/tasks/${id}/execute`);
    if (i === 50) await page.evaluate('page.most = 103'); // instead of 500
  }
  await until(() => page.evaluate('page.runs.length < 50 && openRuns().length === 0'), 'all is over, and what is old is dropped');
  equal(await page.evaluate('state.live.size'), 0, 'of what is over nothing is kept');
  const first = await page.evaluate('page.runs.at(-1).id');
  await button('Show older ones').click();
  await until(() => page.evaluate(`page.runs.length > 40 && page.runs.some(run => run.id === ${first - 1})`), 'the older ones come back');
  await service.ask('DELETE', '/tasks/' + id);
});

fact('a press on Save counts, though a preview that moves it is answered just then', async () => {
  for (const [when, typed] of [['between press and release', '62 * * * *'], ['just before the press', '*/90 0 1 * MON']]) {
    await open(service, '#/tasks/1/schedules/new');
    const field = page.getByLabel('Cron expression');
    await field.fill('61 * * * *');
    await page.keyboard.press('Tab');
    await until(async () => await field.getAttribute('aria-invalid') === 'true', 'the field is marked once it is left');
    let answer;
    await page.route('**/schedules/preview', route => { answer = () => route.continue(); });
    await page.route('**/api/v1/schedules', route => route.abort());
    await field.fill(typed);
    await until(() => answer, 'the preview is asked');
    const place = () => button('Save').boundingBox();
    const { x, y, width, height } = await place();
    await page.mouse.move(x + width / 2, y + height / 2);
    const pressed = when.startsWith('between');
    if (pressed) await page.mouse.down();
    await Promise.all([page.waitForResponse('**/schedules/preview'), answer()]);
    await sleep(0.1);
    if (!pressed) await page.mouse.down();
    const sent = page.waitForRequest('**/api/v1/schedules', { timeout: 5000 });
    await page.mouse.up();
    await sent.catch(() => { throw Error(`nothing was sent: the answer came ${when}`); });
    await until(async () => (await place()).y > y + 10, 'the answer shows, and has moved the button');
    await page.unrouteAll();
    await page.getByRole('link', { name: 'Cancel' }).click();
    await sure('Leave');
  }
  forgive('ERR_'); // what the test held back or refused
  forgive('422');
});

fact('a managed task says by whom, and all is exported as a file', async () => {
  const definitions = { chronotask: 1, owner: 'ops', tasks: { 'from-git': { task_type: 'bash', config: { command: 'true' } } } };
  await service.ask('POST', '/apply', definitions);
  const [{ id }] = (await service.ask('GET', '/tasks?key=from-git')).tasks;
  for (const hash of [`#/tasks/${id}`, `#/tasks/${id}/edit`]) {
    await open(service, hash);
    await sees('Managed by the file of ops: what you change here by hand is overwritten');
  }
  equal(await page.locator('[name=schedules]').count(), 0, 'fields for what the file makes');
  await open(service);
  const [download] = await Promise.all([page.waitForEvent('download'), more('Export as a file')]);
  equal(download.suggestedFilename(), 'chronotask.json');
  equal(JSON.parse(readFileSync(await download.path())), await service.ask('GET', '/export'));
  await service.ask('DELETE', `/tasks/${id}`);
});

fact('an alert is made in words, tried, and linked with what it watches and what caused it', async () => {
  const narrow = async name => { await page.setViewportSize({ width: 390, height: 844 }); await shot(name + '-390'); holds(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), `${name} is wider than 390`); await page.setViewportSize({ width: 1280, height: 900 }); };
  const backup = await service.bash('Backup of the week', 'echo half; echo disk full >&2; exit 2', { tags: ['nightly'], pause_after: 4 });
  for (const name of ['Sync', 'Report', 'Rotate', 'Vacuum', 'Mirror', 'Index']) await service.bash(name, 'true');
  const alert = await service.bash('Tell somebody', 'echo "$CHRONOTASK_CAUSE_TEXT"');
  await open(service, `#/tasks/${alert}/schedules/new`);
  await page.getByLabel('after other tasks').check();
  holds(await page.locator('[name=catchup]').isHidden(), 'what this type has not is not asked for');
  await page.getByText('Rules: overlap').click();
  holds(await page.locator('[name=catchup]').isHidden(), 'neither under its rules');
  equal(await page.locator('[name=overlap]').inputValue(), 'allow', 'overlap of this type');
  await button('Save').click();
  await until(async () => (await page.locator('[id="f-schedule_config.task_ids-wrong"]').innerText()) !== '', 'no task is chosen: it says so beside them');
  forgive('422');
  await page.getByLabel('Find tasks').fill('of the WEEK');
  await until(async () => await page.locator('#watched label:visible').count() === 1, 'one task is found');
  await page.getByLabel('Backup of the week').check();
  await page.getByLabel('Find tasks').fill('');
  await page.getByLabel('Sync', { exact: true }).check();
  await page.getByLabel('failed, timed out').uncheck();
  holds(await page.locator('[name="schedule_config.threshold"]').isHidden(), 'a threshold without a streak');
  await page.getByLabel('failed so many times').check();
  await page.getByLabel('has recovered').check();
  await page.locator('[name="schedule_config.threshold"]').fill('2');
  await until(async () => (await text('#preview')).includes("After 'Backup of the week' or 'Sync' failed 2 times in a row, and when it has recovered"), 'the schedule in words');
  await axeFinds('the form of an alert');
  await shot('after-form');
  await narrow('after-form');
  await button('Save').click();
  await until(async () => await text('h1') === 'Tell somebody', 'saved');
  const { schedules: [made] } = await service.ask('GET', `/schedules?task_id=${alert}`);
  equal([made.schedule_config, made.overlap], [{ task_ids: [backup, (await service.ask('GET', '/tasks?q=Sync')).tasks[0].id], on: ['broke', 'recovered'], threshold: 2 }, 'allow']);
  // It is edited, and what nobody touched stays.
  await open(service, '#/schedules/' + made.id);
  equal(await page.locator('[name=watched]:checked').count(), 2, 'the chosen tasks');
  await until(async () => (await text('#preview')).includes('failed 2 times in a row'), 'what it means, before anything is touched');
  await page.getByLabel('no success for too long').check();
  await until(async () => (await text('#preview')).includes('must be exactly one task for overdue'), 'why it cannot be');
  await page.getByLabel('Sync', { exact: true }).uncheck();
  await page.getByLabel('How long without a success').fill('2');
  await page.getByLabel('Unit of time').locator('visible=true').selectOption('days');
  await until(async () => (await text('#preview')).includes("After 'Backup of the week' has not succeeded for 48 hours"), 'overdue in words');
  await shot('after-overdue');
  await page.getByLabel('one of these').check();
  await button('Save').click();
  await until(async () => await text('h1') === 'Tell somebody', 'saved again');
  forgive('422');
  equal((await service.ask('GET', '/schedules/' + made.id)).schedule_config, { task_ids: [backup], on: ['broke', 'recovered'], threshold: 2 });
  // By tag and for any.
  await service.ask('POST', '/schedules', { task_id: alert, schedule_type: 'after', schedule_config: { tag: 'nightly', on: ['paused'] } });
  await open(service, '#/tasks/' + alert);
  await until(async () => (await text('#triggered')).includes('Backup of the week'), 'what triggers it');
  await page.getByRole('button', { name: 'Send a test' }).click();
  await until(async () => (await page.locator('#history').innerText().catch(() => '')).includes('test'), 'the test runs');
  await page.locator('#history a').first().click();
  await sees('This is a test of Tell somebody.');
  await shot('after-test');
  // Three failures: told at the second; with a fourth the task is paused.
  await open(service, '#/tasks/' + backup);
  for (let i = 0; i < 3; i++) await service.run(backup);
  await until(async () => (await text('.top')).includes('failed 3 times in a row'), 'the streak, live');
  await until(async () => (await text('#triggers')).includes('Tell somebody'), 'what it triggers');
  await service.run(backup);
  await until(async () => /^paused after 4 failures in a row \(pause_after\), \d\d:\d\d/.test(await text('.card')), 'why it is paused');
  await axeFinds('a task with a streak');
  await shot('after-watched');
  await narrow('after-watched');
  await page.locator('#triggers a').first().click();
  await until(async () => await text('h1') === 'Tell somebody', 'the alert');
  await until(async () => (await text('#history')).includes('is paused now'), 'what happened, in its history');
  await until(async () => (await text('.stats')).includes('Runs\n3'), 'the runs that were counted since');
  await shot('after-alert');
  await narrow('after-alert');
  const caused = await service.ask('GET', `/executions?task_id=${alert}&trigger=after`);
  equal(caused.executions.map(x => x.cause.event), ['paused', 'broke']);
  await open(service, '#/executions/' + caused.executions[1].id);
  await until(async () => (await text('section.Cause')).includes('Backup of the week failed (exit status 2: disk full), 2 times in a row'), 'the cause');
  await axeFinds('an execution with a cause');
  await shot('after-caused');
  await narrow('after-caused');
  await page.locator('section.Cause a', { hasText: 'Execution' }).click();
  await until(async () => (await text('dl')).includes(`Execution ${caused.executions[1].id} of Tell somebody`), 'what it caused');
  await shot('after-cause');
  await page.locator('dl a', { hasText: `Execution ${caused.executions[1].id}` }).click();
  await until(async () => (await text('section.Cause')).includes('disk full'), 'and back again');
  await open(service);
  await until(async () => (await text('#tasks')).includes('failed 4 times in a row'), 'the streak in the list');
  equal(await page.getByRole('button', { name: 'Send a test: Tell somebody' }).count(), 1, 'the alert in the list');
  await shot('after-list');
  await narrow('after-list');
  await service.ask('DELETE', '/tasks/' + alert);
  await service.ask('DELETE', '/tasks/' + backup);
  forgive('422'); // a preview of a form that is half filled in
});

fact('a task is deleted after a question that says what goes with it', async () => {
  const id = await service.bash('Short life', 'true');
  await open(service, '#/tasks/' + id);
  await tabTo('.top summary');
  await page.keyboard.press('Enter');
  await page.keyboard.press('Tab');
  await page.keyboard.press('Escape');
  equal([await page.locator('.menu[open]').count(), await page.evaluate(() => document.activeElement.localName)], [0, 'summary'], 'Escape closes the menu, and its button has the focus');
  await more('Delete…');
  await sees('Its 0 schedules and the history of its 0 runs go with it');
  await sure('No, go back');
  equal((await service.ask('GET', '/tasks/' + id)).name, 'Short life', 'after a no');
  await more('Delete…');
  await sure('Delete');
  await until(async () => /well|attention/.test(await text('h1')), 'back on the list');
  holds(!(await text('main')).includes('Short life'), 'it is gone');
  const waits = await service.bash('Waits long', 'false', { max_retries: 1, retry_delay: 600 });
  const { id: run } = await service.run(waits, 0);
  const other = watch(await context.newPage());
  await other.goto(service.base + '/#/executions/' + run);
  await open(service);
  await until(async () => /Waits long\n.*\n.*retrying/.test(await text('#running')), 'it waits');
  await other.getByText('retrying').first().waitFor();
  await service.ask('DELETE', '/tasks/' + waits);
  await until(async () => !(await text('main')).includes('Waits long'), 'its run is gone with it');
  await other.getByText('This execution was deleted with its task').waitFor();
  await other.close();
  await open(service, '#/executions');
  holds(!(await text('main')).includes('Waits long'), 'there, too');
});

fact('what a task says stays text, wherever it shows', async () => {
  const evil = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>';
  const page_ = http.createServer((request, answer) => { answer.setHeader('Content-Type', 'text/html'); answer.setHeader('X-Evil', evil); answer.end(evil + 'body'); }).listen(0, '127.0.0.1');
  await once(page_, 'listening');
  const id = await service.bash(evil, `printf '%s\\n\\033[31mred\\033[0m\\nevent: reset\\ndata: {}\\n\\n' '${evil}'; printf '%s' '${evil}' >&2; exit 1`, { description: evil });
  const web = await service.ask('POST', '/tasks', { name: evil + '2', task_type: 'http', config: { url: `http://127.0.0.1:${page_.address().port}/`, headers: { 'X-Note': evil } } });
  await service.ask('POST', '/schedules', { task_id: id, schedule_type: 'cron', schedule_config: { expression: '0 0 1 1 *' } });
  const alert = await service.bash(evil + '3', 'printf %s "$CHRONOTASK_CAUSE_OUTPUT"');
  const after = await service.ask('POST', '/schedules', { task_id: alert, schedule_type: 'after', schedule_config: { task_ids: [id], on: ['failure'] } });
  const runs = [await service.run(id), await service.run(web.id)];
  page_.close();
  await until(async () => (await service.ask('GET', '/tasks/' + alert)).last_status === 'succeeded', 'the alert');
  const [caused] = (await service.ask('GET', `/executions/${runs[0].id}`)).caused;
  for (const hash of ['#/', `#/tasks/${id}`, `#/tasks/${id}/edit`, `#/executions/${runs[0].id}`, `#/tasks/${web.id}`, `#/tasks/${web.id}/edit`, `#/executions/${runs[1].id}`, `#/tasks/${alert}`, `#/executions/${caused}`, `#/schedules/${after.id}`, '#/executions', '#/upcoming?span=week', '#/changes', '#/?group=tag', `#/tasks/${id}/run`]) {
    await open(service, hash);
    await sleep(0.3);
    holds(!await page.evaluate(() => window.hacked), `${hash}: its script ran`);
    equal(await page.locator('main :is(img, script, iframe)').count(), 0, `${hash}: elements`);
    const values = await page.evaluate(() => [...document.querySelectorAll('input, textarea')].map(node => node.value).join('\n'));
    holds((await page.locator('main').textContent() + values).includes(evil), `${hash}: the text is not there`);
  }
  await shot('hostile');
  await service.ask('DELETE', '/tasks/' + id);
  await service.ask('DELETE', '/tasks/' + web.id);
});

fact('the Content-Security-Policy lets nothing in', async () => {
  const answer = await fetch(service.base + '/', { headers: { Accept: 'text/html' } });
  const policy = answer.headers.get('Content-Security-Policy');
  holds(policy.startsWith("default-src 'none'") && !policy.includes('unsafe'), policy);
  equal((await answer.text()).match(/ on[a-z]+="|style="|https?:\/\/(?!www\.w3\.org|example\.org)/g), null, 'handlers, styles and addresses in the page');
  await open(service);
  await page.evaluate(() => { const node = document.createElement('script'); node.textContent = 'window.injected=1'; document.body.append(node); const image = document.createElement('img'); image.src = '/health'; document.body.append(image); });
  await sleep(0.2);
  equal(await page.evaluate(() => window.injected), undefined);
  complaints = complaints.filter(complaint => !complaint.includes('Content Security Policy'));
});

fact('every view is whole at 390 pixels, light and dark, without a violation', async () => {
  const id = (await service.ask('GET', '/tasks?q=Say')).tasks[0].id;
  await service.ask('PATCH', '/tasks/' + id, { status: 'active' });
  const run = (await service.ask('GET', `/executions?task_id=${id}`)).executions.at(-1).id;
  const alert = await service.bash('Alarm', 'echo "$CHRONOTASK_CAUSE_TEXT"');
  const schedule = await service.ask('POST', '/schedules', { task_id: alert, schedule_type: 'after', schedule_config: { task_ids: [id], on: ['success', 'recovered'] }, max_runs: 1 });
  const [told] = await until(async () => { const { executions } = await service.ask('GET', `/executions?task_id=${alert}`); return executions.length && executions; }, 'the alarm');
  const views = { alert: `#/tasks/${alert}`, told: `#/executions/${told.id}`, after: '#/schedules/' + schedule.id, list: '#/', task: `#/tasks/${id}`, execution: `#/executions/${run}`, 'new-task': '#/tasks/new', 'new-schedule': `#/tasks/${id}/schedules/new`, missing: '#/tasks/99999',
    executions: '#/executions', day: '#/upcoming', week: '#/upcoming?span=week', changes: '#/changes', groups: '#/?group=tag&sort=-last', edit: `#/tasks/${id}/edit`, run: `#/tasks/${id}/run` };
  const look = async (name, width, scheme, rules) => {
    await page.emulateMedia({ colorScheme: scheme });
    const [red] = (await page.evaluate(() => getComputedStyle(document.body).backgroundColor)).match(/\d+/);
    equal(Number(red) > 128, scheme === 'light', 'a light background');
    await axeFinds(`${name}, ${width}, ${scheme}`, rules);
    await shot(`${name}-${width}-${scheme}`);
  };
  for (const [name, hash] of Object.entries(views)) {
    await page.setViewportSize({ width: 390, height: 860 });
    await open(service, hash);
    for (const width of [390, 1280]) {
      await page.setViewportSize({ width, height: 860 });
      await sleep(0.3); // what is drawn anew for another width
      holds(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), `${name} is wider than ${width}`);
      await look(name, width, 'light');
      await look(name, width, 'dark', ['color-contrast']); // all else is the same in both
    }
  }
  await page.setViewportSize({ width: 1280, height: 900 });
  await page.emulateMedia({ colorScheme: 'light' });
  forgive('404');
});

fact('/docs shows every operation and tries one', async () => {
  await page.goto(service.base + '/docs');
  await sees('/api/v1/tasks/{id}/execute');
  const spec = await (await fetch(service.base + '/openapi.json')).json();
  equal(await page.locator('details[data-path]').count(), Object.values(spec.paths).flatMap(verbs => Object.keys(verbs)).length, 'operations');
  const box = page.locator('details[data-verb=POST][data-path="/api/v1/schedules/preview"]');
  await box.locator('summary').first().click();
  await box.getByRole('button', { name: 'Try it' }).click();
  await until(async () => (await box.innerText()).includes('"upcoming"'), 'the answer');
  holds((await box.locator('pre').last().innerText().catch(() => '')) !== null && (await box.innerText()).includes("curl \\\n  -X POST"), 'the example for a shell');
  const one = page.locator('details[data-verb=GET][data-path="/api/v1/tasks/{id}"]');
  await one.locator('summary').first().click();
  await one.locator('input').fill('1');
  await one.getByRole('button', { name: 'Try it' }).click();
  await until(async () => (await one.innerText()).includes('Say hello'), 'the answer');
  const stream = page.locator('details[data-verb=GET][data-path="/api/v1/events"]');
  await stream.locator('summary').first().click();
  await stream.getByRole('button', { name: 'Try it' }).click();
  await until(async () => (await stream.innerText()).includes('event: execution'), 'the first seconds of a stream');
  await axeFinds('/docs');
  await shot('docs');
  equal(await page.getByRole('heading', { level: 2 }).allInnerTexts().then(found => found.map(one => one.replace(/ \d+$/, ''))), ['Tasks', 'Schedules', 'Executions', 'Looking on', 'The scheduler', 'Files and backup', 'The service'], 'groups');
  await page.getByRole('searchbox', { name: 'Search calls' }).fill('backfill');
  equal(await page.locator('details.call:visible').count(), 1, 'calls that match');
  await page.setViewportSize({ width: 390, height: 860 });
  holds(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), '/docs is wider than 390');
  await page.setViewportSize({ width: 1280, height: 900 });
});

fact('a lost connection shows, and comes back with what happened meanwhile', async () => {
  await open(service);
  await service.stop('SIGKILL');
  await until(async () => (await text('#link')).includes('Disconnected'), 'it says so');
  await axeFinds('the list without a connection');
  await shot('disconnected');
  await service.start();
  await service.bash('Made meanwhile', 'true');
  await page.getByRole('button', { name: 'Retry now' }).click({ timeout: 1000 }).catch(() => {}); // unless it has come back by itself
  await until(async () => await text('#link') === 'Live', 'it is live again', 20);
  await until(async () => await rows('Tasks', 'Made meanwhile').count() === 1, 'what was made meanwhile');
  const id = (await service.ask('GET', '/tasks?q=meanwhile')).tasks[0].id;
  await service.run(id);
  await until(async () => (await rows('Tasks', 'Made meanwhile').innerText()).includes('succeeded'), 'further events');
  forgive('ERR_');
});

fact('many tabs do not take each other the connections, and one that shows again has what happened', async () => {
  const others = [];
  try {
    for (let i = 0; i < 8; i++) {
      const tab = watch(await context.newPage());
      others.push(tab);
      await tab.addInitScript(() => {
        window.away = true; // as a tab in the background is: here all would count as shown
        Object.defineProperty(document, 'hidden', { get: () => window.away });
      });
      await tab.goto(service.base + '/#/executions');
      await until(async () => await tab.locator('#link').innerText() === 'Live', `tab ${i} is live`, 30);
    }
    await open(service);
    await service.bash('Made behind a tab', 'true');
    await others[0].evaluate(() => {
      window.away = false;
      location.hash = '#/';
      document.dispatchEvent(new Event('visibilitychange'));
    });
    await until(async () => (await others[0].locator('main').innerText()).includes('Made behind a tab'), 'what was made meanwhile', 10);
  } finally { for (const tab of others) await tab.close(); }
  forgive('ERR_');
});

fact('a service that hangs is noticed, too', async () => {
  const before = page;
  page = watch(await browser.newPage()); // with a clock of its own, which is moved on
  await page.clock.install();
  try {
    await open(service);
    service.process.kill('SIGSTOP');
    await page.clock.fastForward(20000);
    equal(await text('#link'), 'Live', 'one keepalive may be missed');
    await page.clock.fastForward(6000);
    await until(async () => (await text('#link')).includes('Disconnected'), 'it says so', 10);
    service.process.kill('SIGCONT');
    await until(async () => await text('#link') === 'Live', 'it is live again', 40);
  } finally {
    service.process.kill('SIGCONT');
    await page.close();
    page = before;
  }
  forgive('ERR_');
});

fact('a page that cannot load says so and recovers', async () => {
  await page.goto('about:blank');
  await page.route('**/api/v1/overview*', route => route.fulfill({ status: 503, contentType: 'application/problem+json', body: '{"detail":"the database cannot be written"}' }));
  await page.goto(service.base + '/');
  await sees('the database cannot be written');
  await axeFinds('the error');
  await page.unroute('**/api/v1/overview*');
  await page.getByRole('button', { name: 'Try again' }).click();
  await until(async () => /well|attention/.test(await text('h1').catch(() => '')), 'it loads');
  await open(service, '#/executions');
  const filtered = /executions\?status=missed&/; // not what the page reads at its start beside it
  await page.route(filtered, route => route.fulfill({ status: 503, contentType: 'application/problem+json', body: '{"detail":"too many rows"}' }));
  await page.getByLabel('missed', { exact: true }).check();
  await sees('Not all could be loaded: too many rows');
  await page.unroute(filtered);
  await page.getByLabel('failed', { exact: true }).check();
  await page.getByRole('alert').filter({ hasText: 'Not all' }).waitFor({ state: 'detached' });
  forgive('503');
});

fact('a token is asked for once, told when it is wrong, kept by the open tabs alone, and forgotten by all of them', async () => {
  const guarded = await new Service(await freePort(), 'guarded', { CHRONOTASK_API_TOKEN: 'open-sesame' }).start();
  try {
    await guarded.bash('Behind the door', 'echo hi');
    await page.goto(guarded.base + '/');
    await page.locator('dialog[open]').waitFor();
    await axeFinds('the question for the token');
    await shot('token');
    await page.getByLabel('API token').fill('wrong');
    await page.keyboard.press('Enter');
    await sees('This token is not known here.');
    await axeFinds('the question after a wrong token');
    await shot('token-wrong');
    await page.getByLabel('API token').fill('open-sesame');
    await page.keyboard.press('Enter');
    await sees('Behind the door');
    await until(async () => await text('#link') === 'Live', 'the stream carries the token');
    await page.reload();
    await sees('Behind the door');
    equal(await page.locator('dialog[open]').count(), 0, 'dialogs after a reload');
    await page.goto(guarded.base + '/docs');
    await sees('/api/v1/tasks/{id}/execute');
    equal(await page.evaluate(() => [document.cookie, localStorage.length]), ['', 0], 'kept elsewhere');
    await page.goto(guarded.base + '/');
    const second = watch(await context.newPage());
    await second.goto(guarded.base + '/#/tasks/1');
    await until(async () => (await second.locator('body').innerText()).includes('API_TOKEN (admin)'), 'another tab is let in by the first');
    await second.getByRole('button', { name: 'Sign out' }).click();
    for (const tab of [page, second]) await tab.locator('dialog[open]').waitFor();
    equal(await page.evaluate(() => sessionStorage.length), 0, 'what the first tab keeps');
    await second.getByLabel('API token').fill('open-sesame');
    await second.keyboard.press('Enter');
    await sees('Behind the door');
    equal(await page.locator('dialog[open]').count(), 0, 'the first tab is let in by the second');
    await second.close();
  } finally {
    await page.goto('about:blank');
    await guarded.stop();
  }
  forgive('401');
});

fact('what the scope of a token cannot do is not shown, and a task shows who changed it', async () => {
  await page.goto('about:blank'); // what was open looks for a service that has ended
  complaints = [];
  const tokens = join(folder, 'tokens');
  writeFileSync(tokens, 'viewer read view-view-view\noncall run run-run-run\nboss admin open-sesame\n', { mode: 0o600 });
  const guarded = await new Service(await freePort(), 'scoped', { CHRONOTASK_API_TOKENS_FILE: tokens, CHRONOTASK_API_TOKEN: 'the-first-one' }).start();
  const shown = { viewer: [], oncall: ['Run now'], boss: ['Run now', 'Pause', 'Edit', 'Delete…', 'Add schedule', 'Pause all schedules…', 'New task'] };
  try {
    const id = await guarded.bash('Shared', 'echo hi');
    await guarded.ask('POST', '/schedules', { task_id: id, schedule_type: 'interval', schedule_config: { seconds: 3600 } });
    await guarded.ask('PATCH', '/tasks/' + id, { description: 'What it is for', config: { command: 'echo hello' } });
    for (const [name, token] of [['viewer', 'view-view-view'], ['oncall', 'run-run-run'], ['boss', 'open-sesame']]) {
      await page.goto('about:blank');
      await page.goto(guarded.base + '/#/tasks/' + id);
      await page.locator('dialog[open]').waitFor();
      await page.getByLabel('API token').fill(token);
      await page.keyboard.press('Enter');
      await sees(`${name} (`);
      const visible = new Set();
      for (const hash of ['#/tasks/' + id, '#/']) {
        await page.goto(guarded.base + '/' + hash);
        await sees('Shared');
        await until(async () => await page.locator(hash === '#/' ? '#tasks tbody tr' : '#plans li').count() === 1, 'the page is there');
        await page.locator('.top summary').click();
        for (const label of await page.locator('main :is(button, a.button):visible').allInnerTexts()) visible.add(label);
        await shot(`scope-${name}-${hash === '#/' ? 'list' : 'task'}`);
      }
      equal(['Run now', 'Pause', 'Edit', 'Delete…', 'Add schedule', 'Pause all schedules…', 'New task'].filter(label => visible.has(label)), shown[name], name);
      await page.goto(guarded.base + '/#/tasks/' + id);
      await page.locator('summary', { hasText: 'update' }).click();
      await sees('echo hello');
      holds((await text('section.Changes')).includes('by API_TOKEN via rest 127.0.0.1: description, config'), await text('section.Changes'));
      equal(await page.locator('section.Changes details').count(), 3, 'changes of the task and its schedule');
      await axeFinds('a task as ' + name);
      await shot('changes-' + name);
      if (name === 'boss') {
        await page.getByRole('button', { name: 'Pause', exact: true }).first().click();
        await sees('by boss via rest 127.0.0.1');
      }
      if (name === 'viewer') { // its token goes, another one is given: the page is that one's, without a reload
        await guarded.ask('POST', `/tasks/${id}/execute?wait=5`);
        await until(async () => await rows('Executions').count() === 1, 'its run shows');
        writeFileSync(tokens, 'oncall run run-run-run\nboss admin open-sesame\n', { mode: 0o600 });
        await page.locator('dialog[open]').waitFor();
        await page.getByLabel('API token').fill('run-run-run');
        await page.keyboard.press('Enter');
        await sees('oncall (run)');
        forgive('INCOMPLETE_CHUNKED'); // the stream of the token that is gone
        await button('Run now').first().waitFor();
      }
      await page.getByRole('button', { name: 'Sign out' }).click();
      await page.locator('dialog[open]').waitFor();
    }
  } finally { await guarded.stop(); }
  forgive('401');
});

// ---- A service with a month of history: what the views are for

const MONTH = `
import random, sqlite3, sys, uuid
db, now = sqlite3.connect(sys.argv[1]), int(sys.argv[2]) * 1000
random.seed(7)
usual = [180, 900, .24, 4, 1.3, 12, .9, 45, 2.2, 600, 7, .5, 1.5]
for task, seconds in enumerate(usual, 1):
    often, streak, last = task in (3, 7, 8, 9, 11, 12), 0, None
    for k in range(45, 0, -1):
        start = now - k * (3600 if often else 43200) * 10**6 + random.randrange(10**6) - 10**9
        bad = task == 1 and k <= 3 or task == 12 and k == 1 or task not in (8, 13) and random.random() < .05 and k > 3
        status = "failed" if bad else "skipped" if task == 8 and k <= 2 else "succeeded"
        error = {"failed": "exit status 2: connection to server at db1 failed: No route to host", "skipped": "the last run was still going"}.get(status)
        took = int(seconds * (.8 + random.random() * .5) * 10**6)
        ran = status != "skipped"
        row = (task, "schedule", status, start, start, start if ran else None, start + took, int(ran), str(uuid.uuid4()), error)
        db.execute(f"INSERT INTO executions (task_id, trigger, status, scheduled_for, queued_at, started_at, finished_at, attempt, uuid, error_message) VALUES ({','.join('?' * 10)})", row)
        if ran:
            streak, last = streak + 1 if bad else 0, (start, status)
    db.execute("UPDATE tasks SET last_run = ?, last_status = ?, run_count = 45, failures_in_a_row = ? WHERE id = ?", (*last, streak, task))
db.execute("UPDATE schedules SET created_at = created_at - 1000000000, next_slot = next_slot - 1000000000, next_fire = next_fire - 1000000000, in_force_since = in_force_since - 1000000000, dealt_with = dealt_with - 1000000000, settled_until = settled_until - 1000000000 WHERE schedule_type = 'after' AND schedule_config LIKE '%overdue%'")
db.commit()
`;
const cron = expression => ({ schedule_type: 'cron', schedule_config: { expression, timezone: 'Europe/Berlin' } });
let month; // it is made once, by the first fact that needs it
async function aMonth() {
  if (month) return month;
  month = await new Service(await freePort(), 'month', { CHRONOTASK_HISTORY_DAYS: '0' }).start();
  const task = (name, tags, config, ...schedules) => month.ask('POST', '/tasks', { name, tags, task_type: config.url ? 'http' : 'bash', config, schedules, max_retries: 0 });
  const seconds = seconds => ({ schedule_type: 'interval', schedule_config: { seconds } });
  await task('Nightly backup of the database', ['backup', 'prod'], { command: 'pg_dump shop | zstd > /backup/shop.zst' }, cron('0 2 * * *'));
  await task('Copy backups off site', ['backup'], { command: 'rclone sync /backup remote:backup' }, cron('30 3 * * *'));
  await task('Health check of the shop', ['prod', 'watch'], { url: 'http://127.0.0.1:9/health' }, seconds(86400));
  await task('Send the weekly report', ['reports'], { url: 'http://127.0.0.1:9/weekly', method: 'POST', body: { to: 'team' } }, cron('0 7 * * MON'));
  await task('Rotate logs', ['prod'], { command: 'logrotate /etc/logrotate.conf' }, { schedule_type: 'cron', schedule_config: { expression: '15 0 * * *', timezone: 'UTC' } });
  await task('Renew certificates', ['prod', 'tls'], { command: 'certbot renew --quiet' }, cron('0 4 * * MON,THU'));
  await task('Import exchange rates', ['finance'], { url: 'http://127.0.0.1:9/daily' }, cron('5 6-18 * * MON-FRI'));
  await task('Rebuild the search index', ['shop'], { command: 'bin/reindex' }, cron('30 */6 * * *'));
  await task('Clean up sessions', ['shop'], { command: 'bin/sessions --prune' }, seconds(3600));
  await task('Close the books of the month', ['finance'], { command: 'bin/close-month' }, cron('0 1 1 * *'));
  await task('Sync users from the directory', ['ops'], { command: 'bin/ldap-sync' }, seconds(43200));
  await task('Tell the team', ['alerts'], { command: 'curl -d "$CHRONOTASK_CAUSE_TEXT" ntfy.test/ops' }, { schedule_type: 'after', schedule_config: { tag: 'backup', on: ['broke', 'recovered'] } });
  await task('Import of the catalogue', ['shop'], { command: 'for i in $(seq 600); do echo "row $i imported"; sleep 0.2; done' });
  const heard = (await task('Nothing heard', ['watch'], { command: 'true' }, { schedule_type: 'after', schedule_config: { task_ids: [10], on: ['overdue'], seconds: 600 } })).id;
  await month.stop();
  execFileSync(python, ['-c', MONTH, join(folder, 'month.db'), String(Date.now())]);
  await month.start();
  await until(async () => (await month.ask('GET', '/tasks/' + heard)).run_count === 1, 'the overdue one is told');
  month.import = (await month.run(13, 0)).id;
  return month;
}

fact('at a glance: what fails since when, alerts not sent, skipped, overdue, and what runs longer than usual', async () => {
  await open(await aMonth());
  const row = async name => (await page.locator('#attention li', { hasText: name }).innerText()).replaceAll('\n', ' ');
  equal(await text('h1'), '4 tasks need attention');
  holds(/failing since (\w+, \d+ \w+|yesterday) \d\d:\d\d, 3 runs in a row.*No route to host/.test(await row('Nightly backup')), await row('Nightly backup'));
  holds((await row('Tell the team')).includes('this alert could not be sent: failing since'), await row('Tell the team'));
  holds((await row('Rebuild the search index')).includes('skipped 2 slots in the last day'), await row('Rebuild the search index'));
  holds((await row('Close the books')).includes('overdue: no success for 10 min'), await row('Close the books'));
  equal((await page.locator('#attention li').first().innerText()).startsWith('Tell the team'), true, 'the alert is first: it hides the others');
  await until(async () => /running\s*\d+ s, usually 1\.\d s/.test(await page.locator('#running').innerText()), 'beyond its usual time', 30);
  holds(/running\s*\d+ s, usually/.test(await rows('Tasks', 'Import of the catalogue').innerText()), 'in the list too');
  await axeFinds('the list of a busy service');
  for (const scheme of ['light', 'dark']) { // for the README, when it is asked for
    await page.emulateMedia({ colorScheme: scheme });
    await page.setViewportSize({ width: 1280, height: 1020 });
    await page.screenshot({ path: join(process.env.CHRONOTASK_TEST_PICTURES || join(folder, 'shots'), `dashboard-${scheme}.png`) });
  }
  await page.emulateMedia({ colorScheme: 'light' });
  await page.setViewportSize({ width: 1280, height: 900 });
  await month.ask('POST', '/scheduler/pause', {});
  await page.getByRole('status', { name: 'Firing is paused' }).waitFor();
  equal(await text('h1'), '4 tasks need attention', 'what is wrong is said beside the pause');
  await month.ask('POST', '/scheduler/resume');
});

fact('lists have one header line, are sorted, grouped, and many are changed at once after a question', async () => {
  await open(await aMonth());
  const table = page.getByRole('table', { name: 'Tasks' });
  equal((await table.getByRole('columnheader').allInnerTexts()).map(one => one.trim()), ['', 'Name ▲', 'Last 30 runs', 'Success', 'Typical', 'Last run', 'Next run', 'What to do']);
  await button('Typical').click();
  await until(async () => await table.getByRole('columnheader', { name: 'Typical' }).getAttribute('aria-sort') === 'ascending', 'the order is told');
  await button('Typical ▲').click();
  await until(async () => (await rows('Tasks').first().innerText()).includes('Copy backups off site'), 'the slowest first');
  equal(new URL(page.url()).hash, '#/?sort=-typical');
  await page.getByLabel('Group by', { exact: true }).selectOption('tag');
  await table.getByRole('rowheader', { name: 'finance 2' }).waitFor();
  await axeFinds('the list in groups');
  await shot('groups');
  await page.getByLabel('Tag', { exact: true }).selectOption('finance');
  await page.getByLabel('Group by', { exact: true }).selectOption('');
  await until(async () => await rows('Tasks').count() === 2, 'two of finance');
  await page.getByLabel('Choose all').check();
  const chosen = page.getByRole('group', { name: 'With the chosen tasks' });
  await chosen.getByText('2 chosen').waitFor();
  await chosen.getByRole('button', { name: 'Pause…' }).click();
  await sees('Their schedules do not fire until they are resumed.');
  await axeFinds('the question before many are paused');
  await shot('bulk');
  equal((await month.ask('GET', '/tasks?tag=finance')).tasks.map(one => one.status), ['active', 'active'], 'before the answer');
  await sure('Pause them');
  await sees('Pause: 2 done.');
  equal((await month.ask('GET', '/tasks?tag=finance')).tasks.map(one => one.status), ['paused', 'paused']);
  await chosen.getByRole('button', { name: 'Resume…' }).click();
  await sure('Resume them');
  await sees('Resume: 2 done.');
  await chosen.getByRole('button', { name: 'Tag…' }).click();
  await page.getByLabel('Tags to add').fill('money, q4');
  await page.getByLabel('Tags to take away').fill('finance');
  await page.keyboard.press('Enter');
  await sees('Tag: 2 done.');
  equal((await month.ask('GET', '/tasks?tag=money')).tasks.map(one => one.tags), [['money', 'q4'], ['money', 'q4']]);
  const victims = [await month.bash('Bulk A', 'true'), await month.bash('Bulk B', 'true', { status: 'disabled' })];
  await open(month, '#/?q=bulk');
  equal(await button('Run now: Bulk B').count(), 0, 'a run that would be refused is not offered');
  await page.getByLabel('Choose all').check();
  await chosen.getByRole('button', { name: 'Run…' }).click();
  await sees('For 1 other of those chosen there is nothing to do.');
  await sure('Run them');
  await until(async () => (await month.ask('GET', '/tasks/' + victims[0])).run_count === 1, 'one ran');
  await chosen.getByRole('button', { name: 'Delete…' }).click();
  await sees('This cannot be undone.');
  await sure('Delete them');
  await sees('No task matches.');
  equal((await month.ask('GET', '/tasks?q=bulk')).total, 0);
});

fact('all executions are filtered in the address, what comes is a timeline, changes tell who', async () => {
  await open(await aMonth(), '#/executions');
  let asked, answered; // the question that the next tick makes out of date
  await page.route(/executions\?status=failed&/, async route => { asked = true; await sleep(1); await route.continue(); answered = true; });
  await page.getByLabel('failed', { exact: true }).check();
  await until(() => asked, 'the first question');
  const ticked = await page.evaluate(() => {
    document.querySelector('[data-many=status][value=skipped]').click();
    return [location.hash, ...[...document.querySelectorAll('.filters a')].map(a => a.hash.includes('failed%2Cskipped'))];
  });
  equal(ticked, ['#/executions?status=failed%2Cskipped', true, true, true], 'both in the address, and in each link as soon as one can press it');
  await until(() => answered, 'the first answer, late');
  await sleep(0.5);
  const isBoth = found => found.some(one => /skipped/.test(one)) && found.every(one => /failed|skipped/.test(one));
  await until(async () => isBoth(await rows('Executions').allInnerTexts()), 'those, and only those');
  await page.unroute(/executions\?status=failed&/);
  await page.getByRole('link', { name: 'last day' }).click();
  await until(() => /since=\d{4}/.test(page.url()), 'since when in the address');
  const since = await page.evaluate(() => new Date(new URLSearchParams(location.hash.split('?')[1]).get('since')).toISOString());
  holds(Math.abs(Date.now() - 86400e3 - Date.parse(since)) < 300e3, 'a day ago, to the minute');
  const expected = (await month.ask('GET', `/executions?status=failed,skipped&since=${since}`)).executions.length;
  await until(async () => await rows('Executions').count() === expected, `the ${expected} of the last day`);
  await page.reload();
  await until(async () => await rows('Executions').count() === expected, 'the same after a reload');
  holds(await page.getByLabel('Since').inputValue() !== '' && await page.getByLabel('failed', { exact: true }).isChecked(), 'the filters too');
  await page.getByLabel('Task', { exact: true }).selectOption({ label: 'Tell the team' });
  await until(async () => (await rows('Executions').allInnerTexts()).every(one => one.includes('Tell the team')), 'of one task');
  await axeFinds('all executions');
  await open(month, '#/upcoming');
  await sees('in the time zone Europe/Berlin');
  await page.getByRole('link', { name: 'Week' }).click();
  await sees('What fires in the week from');
  const backup = page.getByRole('img', { name: /^Nightly backup of the database fires [67] times: .*02:00/ });
  await until(() => backup.count(), 'seven nights');
  holds(await backup.locator('rect').count() >= 6, 'a mark for each');
  await page.getByLabel('Time zone').selectOption('UTC');
  await page.getByRole('img', { name: /^Nightly backup of the database fires [67] times: .*01:00/ }).waitFor();
  await sees('in the time zone UTC');
  await axeFinds('the week');
  await page.getByRole('link', { name: 'Day', exact: true }).click();
  await page.getByRole('link', { name: 'Later' }).click();
  await sees('What fires tomorrow');
  await open(month, '#/changes');
  await page.locator('summary', { hasText: 'update task' }).first().click();
  await sees('by somebody via rest 127.0.0.1: tags');
  await page.getByLabel('Of', { exact: true }).selectOption('scheduler');
  await until(async () => /kind=scheduler/.test(page.url()) && (await page.locator('section.Changes details').allInnerTexts()).every(one => /scheduler/.test(one)), 'of the scheduler alone');
  await open(month, '#/tasks/1');
  await page.getByRole('img', { name: /^Durations of the last 45 runs: longest .*, usually 3 min .*, \d+ failed$/ }).waitFor();
  holds((await page.locator('#plans').innerText()).includes('02:00, '), 'the next slots');
  equal(await page.locator('#triggers a').allInnerTexts(), ['Tell the team']);
});

fact('an execution shows the end of long output, coloured, searched, copied; attempts side by side; run again with changes', async () => {
  const id = await service.bash('Long output', `for i in $(seq 900); do echo "line $i"; done; printf '\\033[1;31merror\\033[0m: no template\\n'; echo '{"failed":["cart"],"ms":4}' >&2; exit 3`, { max_retries: 1, retry_delay: 0 });
  const run = await service.run(id, 20);
  await open(service, '#/executions/' + run.id);
  const out = page.getByRole('region', { name: 'Standard output', exact: true });
  holds(await out.evaluate(box => box.scrollTop + box.clientHeight >= box.scrollHeight - 2), 'the end is what shows');
  await sees('The last 400 of 901 lines.');
  equal(await out.locator('.ansi-bold.ansi-1').innerText(), 'error');
  equal((await page.getByRole('region', { name: 'Standard error', exact: true }).innerText()).split('\n').slice(0, 2), ['{', '  "failed": ['], 'JSON is indented');
  await page.getByRole('searchbox', { name: 'Search in Standard output', exact: true }).fill('LINE 12');
  await sees('1 of 11');
  await button('Next: Standard output').click();
  await sees('2 of 11');
  equal(await out.locator('mark.here').innerText(), 'line 12');
  await page.getByRole('searchbox', { name: 'Search in Standard output', exact: true }).fill('');
  await button('Show all: Standard output').click();
  await until(async () => (await out.innerText()).startsWith('line 1\n'), 'all lines');
  equal(await button('Wrap: Standard output').getAttribute('aria-pressed'), 'true');
  await button('Wrap: Standard output').click();
  await until(async () => await button('Wrap: Standard output').getAttribute('aria-pressed') === 'false', 'lines are not wrapped');
  await context.grantPermissions(['clipboard-read', 'clipboard-write']);
  await button('Copy: Standard error').click();
  await sees('The output copied.');
  equal(await page.evaluate(() => navigator.clipboard.readText()), '{"failed":["cart"],"ms":4}\n', 'as it came');
  const [saved] = await Promise.all([page.waitForEvent('download'), button('Download: Standard output').click()]);
  equal([saved.suggestedFilename(), readFileSync(await saved.path(), 'utf8').split('\n').length], [`execution-${run.id}-stdout.txt`, 902]);
  const attempts = await page.locator('.attempts > li').evaluateAll(nodes => nodes.map(node => Math.round(node.getBoundingClientRect().y)));
  equal([attempts.length, attempts[0]], [2, attempts[1]], 'side by side');
  await axeFinds('an execution with attempts');
  await more('Copy as curl: run it again');
  await until(async () => /curl .*-X POST.*\/api\/v1\/executions\/\d+\/rerun/s.test(await page.evaluate(() => navigator.clipboard.readText())), 'the call for a shell');
  await more('Run again with changes…');
  await until(async () => (await text('h1')).startsWith('Run “Long output”'), 'its form');
  await page.getByRole('textbox', { name: 'Command *' }).fill('echo changed');
  await axeFinds('a run with changes');
  await button('Run').click();
  await until(async () => /^Execution/.test(await text('h1')), 'the new execution');
  await sees('This run alone');
  await until(async () => (await page.getByRole('region', { name: 'Standard output', exact: true }).innerText().catch(() => '')) === 'changed\n', 'its output');
  const { config, executions } = { ...await service.ask('GET', '/tasks/' + id), ...await service.ask('GET', '/executions?task_id=' + id) };
  equal([executions[0].config, config.command.length > 50], [{ command: 'echo changed' }, true], 'the task is as it was');
  await service.ask('DELETE', '/tasks/' + id);
});

fact('what happens while a view is being read is not missed', async () => {
  const id = await service.bash('Over meanwhile', 'sleep 4; echo over');
  const run = await service.ask('POST', `/tasks/${id}/execute`);
  await open(service, '#/');
  const place = '**/api/v1/executions/' + run.id;
  let held = 0;
  await page.route(place, async route => {
    const early = await route.fetch();
    if (!held++) {
      equal((await early.json()).status, 'running', 'as it was');
      await until(async () => (await service.ask('GET', '/executions/' + run.id)).status === 'succeeded', 'it is over');
      await sleep(0.5); // the page has heard of it by then
    }
    await route.fulfill({ response: early });
  });
  await page.evaluate(hash => { location.hash = hash; }, '#/executions/' + run.id);
  await until(async () => (await page.getByRole('region', { name: 'Standard output', exact: true }).innerText().catch(() => '')) === 'over\n', 'its output');
  await page.unroute(place);
  await service.ask('DELETE', '/tasks/' + id);
});

fact('forms speak of units, zones, dates and passwords, and are copied as curl', async () => {
  await open(service, '#/tasks/new');
  await page.getByRole('textbox', { name: 'Name *' }).fill('Ask politely');
  await page.getByLabel('Tags').fill('one, two');
  await page.getByLabel('HTTP request').check();
  await page.getByLabel('URL').fill('ftp://x');
  await page.keyboard.press('Tab');
  await until(() => page.locator('.wrong:visible:not(:empty)').count(), 'what is wrong with the URL');
  await page.getByLabel('Method').selectOption('POST');
  holds((await page.locator('main').innerText()).includes('must begin with http: or https:'), 'the URL, when it is left');
  await page.getByLabel('URL').fill(service.base + '/health');
  await page.getByText('Headers, authorization, timeout').click();
  await page.getByRole('textbox', { name: 'User' }).fill('me');
  await page.getByLabel('Password').fill('secret');
  await page.getByLabel('Give up after').locator('visible=true').fill('2');
  await page.getByLabel('Unit of time').locator('visible=true').first().selectOption('minutes');
  equal(await page.getByLabel('Verify TLS').isChecked(), true, 'the default is shown');
  await page.getByLabel('Verify TLS').uncheck();
  await page.getByLabel('every so often').check();
  await page.getByLabel('Every *').or(page.getByLabel('Every', { exact: true })).fill('2');
  const group = page.locator('[data-when="schedules[0].schedule_type=interval"]');
  await group.getByLabel('Unit of time').selectOption('days');
  await group.getByLabel('Counted from').fill('2030-01-31T09:30');
  await group.getByLabel('Time zone').fill('Europe/Paris');
  equal([await group.getByLabel('Counted from').getAttribute('type'), await group.getByLabel('Time zone').getAttribute('list')], ['datetime-local', 'zones']);
  holds(await page.locator('#zones option').count() > 300, 'zones');
  await until(async () => (await text('#preview')).includes('Every 2 days at 09:30, counted from 2030-01-31 (Europe/Paris)'), 'in words');
  await page.getByText('Rules: overlap').click();
  await page.getByLabel('If the last run is still going').selectOption({ label: 'wait until it is over' });
  await context.grantPermissions(['clipboard-read', 'clipboard-write']);
  await button('Copy as curl').click();
  await sees('The call copied.');
  const copied = await page.evaluate(() => navigator.clipboard.readText());
  holds(copied.startsWith(`curl \\\n  -X POST \\\n  '${service.base}/api/v1/tasks'`) && copied.includes('"days":2'), copied);
  await page.keyboard.press('Control+Enter');
  await until(async () => await text('h1') === 'Ask politely', 'saved');
  const { id, tags, config } = (await service.ask('GET', '/tasks?q=politely')).tasks[0];
  equal([tags, config.timeout, config.auth.username, config.verify_tls, config.method], [['one', 'two'], 120, 'me', false, 'POST']);
  const [schedule] = (await service.ask('GET', '/schedules?task_id=' + id)).schedules;
  equal([schedule.schedule_config, schedule.overlap], [{ days: 2, start_date: '2030-01-31T09:30', timezone: 'Europe/Paris' }, 'queue']);
  await service.ask('DELETE', '/tasks/' + id);
  forgive('422');
});

fact('behind a proxy at /scheduler/ everything works, and openapi.json comes with the token', async () => {
  const guarded = await new Service(await freePort(), 'proxied', { CHRONOTASK_API_TOKEN: 'open-sesame' }).start();
  const id = await guarded.bash('Far away', 'echo hi');
  const proxy = http.createServer((request, answer) => {
    if (!request.url.startsWith('/scheduler/')) return answer.writeHead(404).end();
    const { headers, method, url } = request;
    const through = http.request({ port: guarded.port, host: '127.0.0.1', method, path: url.slice('/scheduler'.length), headers }, back => {
      answer.writeHead(back.statusCode, back.headers);
      back.pipe(answer);
    });
    through.on('error', () => answer.destroy());
    answer.on('close', () => through.destroy());
    request.pipe(through);
  }).listen(0, '127.0.0.1');
  await once(proxy, 'listening');
  const base = `http://127.0.0.1:${proxy.address().port}/scheduler/`;
  try {
    await page.goto(base);
    await page.getByLabel('API token').fill('open-sesame');
    await page.keyboard.press('Enter');
    await until(async () => await text('#link') === 'Live', 'it is live');
    await rows('Tasks').getByRole('link', { name: 'Far away' }).click();
    await until(async () => await text('h1') === 'Far away', 'the task');
    equal(page.url(), `${base}#/tasks/${id}`);
    await button('Run now').click();
    await until(async () => await rows('Executions').count() === 1, 'a run, live');
    await page.locator('#history a').first().click();
    await until(async () => /^Execution/.test(await text('h1')), 'its page');
    for (const name of ['Executions', 'Upcoming', 'Changes', 'Tasks']) {
      await page.locator('nav').getByRole('link', { name, exact: true }).click();
      holds(page.url().startsWith(base + '#/'), page.url());
    }
    await page.locator('nav').getByRole('link', { name: 'API' }).click();
    await sees('/api/v1/tasks/{id}/execute');
    equal(page.url(), base + 'docs');
    const [file] = await Promise.all([page.waitForEvent('download'), page.getByRole('link', { name: 'openapi.json' }).click()]);
    equal(JSON.parse(readFileSync(await file.path())).openapi, '3.1.0');
    const call = page.locator('details[data-verb=GET][data-path="/api/v1/tasks"]');
    await call.locator('summary').first().click();
    await call.getByRole('button', { name: 'Try it' }).click();
    await until(async () => (await call.innerText()).includes('Far away'), 'a call through the proxy');
  } finally {
    await page.goto('about:blank');
    proxy.closeAllConnections();
    proxy.close();
    await guarded.stop();
  }
  forgive('401');
});

fact('the page is sent compressed to who takes that', async () => {
  const ask = encoding => new Promise(done => http.get({ port: service.port, host: '127.0.0.1', path: '/docs', headers: { Accept: 'text/html', 'Accept-Encoding': encoding } }, answer => {
    let size = 0;
    answer.on('data', part => { size += part.length; }).on('end', () => done([answer.headers['content-encoding'] || '', answer.headers.vary, size]));
  }));
  const [encoding, vary, size] = await ask('gzip');
  equal([encoding, vary, size < 60000], ['gzip', 'Accept-Encoding', true], `${size} bytes`);
  holds((await ask('identity'))[2] > 100000, 'as it is to who does not');
});

fact('pages of other origins get nothing done', async () => {
  const victim = await service.bash('Victim', 'true');
  const state = async () => JSON.stringify([(await service.ask('GET', '/tasks?limit=1')).total, (await service.ask('GET', `/executions?task_id=${victim}`)).executions.length, (await service.ask('GET', '/tasks/' + victim)).status, (await service.ask('GET', '/scheduler/status')).paused]);
  const before = await state();
  const attack = target => `<!doctype html><title>evil</title><body><script>
    const target = '${target}', api = target + '/api/v1', task = JSON.stringify({name: 'pwned', task_type: 'bash', config: {command: 'true'}}), said = [];
    const form = (action, enctype, fields, frame) => new Promise(done => {
      const box = document.createElement('iframe'); box.name = frame; box.onload = () => setTimeout(done, 50); setTimeout(done, 1500); document.body.append(box);
      const node = document.createElement('form'); Object.assign(node, {action, enctype, method: 'post', target: frame});
      for (const [name, value] of Object.entries(fields)) { const input = document.createElement('input'); input.name = name; input.value = value; node.append(input); }
      document.body.append(node); node.submit();
    });
    const tell = (name, work) => Promise.resolve().then(work).then(answer => said.push(name + ' ' + (answer?.status ?? answer?.type ?? 'done') + (answer?.type === 'opaque' ? ' opaque' : '')), error => said.push(name + ' refused'));
    const image = url => new Promise(done => { const node = new Image(); node.onload = node.onerror = done; node.src = url; });
    (async () => {
      await tell('form', () => form(api + '/tasks', 'application/x-www-form-urlencoded', {name: 'pwned', task_type: 'bash'}, 'f1'));
      await tell('form multipart', () => form(api + '/tasks', 'multipart/form-data', {name: 'pwned'}, 'f2'));
      await tell('form text', () => form(api + '/tasks', 'text/plain', {[task.slice(0, -1) + ',"x":"']: '"}'}, 'f3'));
      await tell('form execute', () => form(api + '/tasks/${victim}/execute', 'application/x-www-form-urlencoded', {}, 'f4'));
      await tell('form pause', () => form(api + '/scheduler/pause', 'text/plain', {}, 'f5'));
      await tell('fetch text', () => fetch(api + '/tasks', {method: 'POST', headers: {'Content-Type': 'text/plain'}, body: task}));
      await tell('fetch json', () => fetch(api + '/tasks', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: task}));
      await tell('fetch no-cors', () => fetch(api + '/tasks', {method: 'POST', mode: 'no-cors', headers: {'Content-Type': 'text/plain'}, body: task}));
      await tell('fetch execute', () => fetch(api + '/tasks/${victim}/execute', {method: 'POST', mode: 'no-cors'}));
      await tell('fetch blob', () => fetch(api + '/tasks', {method: 'POST', mode: 'no-cors', body: new Blob([task])}));
      await tell('fetch patch', () => fetch(api + '/tasks/${victim}', {method: 'PATCH', headers: {'Content-Type': 'application/json'}, body: '{"status":"disabled"}'}));
      await tell('fetch delete', () => fetch(api + '/tasks/${victim}', {method: 'DELETE'}));
      await tell('beacon', () => navigator.sendBeacon(api + '/tasks/${victim}/execute', new Blob(['{}'], {type: 'text/plain'})));
      await tell('read', () => fetch(api + '/tasks').then(answer => { if (answer.ok) throw said.push('READ TASKS'); return answer; }));
      await tell('read events', () => fetch(api + '/events').then(answer => { if (answer.ok) throw said.push('READ EVENTS'); return answer; }));
      await tell('image', () => image(api + '/tasks/${victim}/execute'));
      await tell('script', () => new Promise(done => { const node = document.createElement('script'); node.src = api + '/tasks'; node.onload = () => { said.push('LOADED SCRIPT'); done(); }; node.onerror = done; document.body.append(node); }));
      await tell('frame', () => new Promise(done => { const box = document.createElement('iframe'); box.src = target + '/'; box.onload = done; document.body.append(box); setTimeout(done, 1500); }));
      await tell('open', () => { open(target + '/api/v1/tasks/${victim}/execute'); return new Promise(done => setTimeout(done, 300)); });
      window.said = said;
    })();
  </script>`;
  const evil = http.createServer((request, answer) => { answer.setHeader('Content-Type', 'text/html'); answer.end(attack(service.base)); }).listen(0, '127.0.0.1');
  await once(evil, 'listening');
  const { port } = evil.address();
  const tab = await context.newPage();
  try {
    const origins = [`http://127.0.0.1:${port}/`, `http://localhost:${port}/`, `http://evil.test:${port}/`];
    for (const origin of origins) {
      await tab.goto(origin);
      const said = await until(() => tab.evaluate(() => window.said), `the attacks from ${origin}`, 30);
      equal(said.filter(line => /READ|LOADED/.test(line)), [], origin);
      equal(await state(), before, `after ${origin}`);
    }
    // Rebinding: the page came from evil.test on this very port, and that name now points at the service; to the browser all is one origin.
    const rebound = `http://evil.test:${service.port}`;
    await tab.route(rebound + '/attack', route => route.fulfill({ contentType: 'text/html', body: attack(rebound) }));
    await tab.goto(rebound + '/attack');
    const said = await until(() => tab.evaluate(() => window.said), 'the attacks after rebinding', 30);
    equal(said.filter(line => /READ|LOADED| 20\d$/.test(line)), [], 'rebinding');
    equal((await tab.goto(rebound + '/')).status(), 403, 'the dashboard under a foreign name');
    equal(await state(), before, 'after rebinding');
  } finally { await tab.close(); evil.close(); for (const other of context.pages()) if (other !== page) await other.close(); }
});

fact('a thousand tasks and a hundred thousand executions are shown at once and searched while typing', async () => {
  const big = new Service(await freePort(), 'big');
  await (await big.start()).stop();
  const fill = `
import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
now = int(sys.argv[2]) * 1000
db.execute("BEGIN")
columns = [row[1] for row in db.execute("PRAGMA table_info(tasks)")]
base = {"name": "", "task_type": "bash", "status": "active", "config": '{"command":"true"}', "max_retries": 0, "retry_delay": 5, "retry_backoff": 2, "created_at": now, "updated_at": now}
base = {k: v for k, v in base.items() if k in columns}
for i in range(1000):
    row = base | {"name": f"Task {i}"}
    db.execute(f"INSERT INTO tasks ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", list(row.values()))
db.execute("""WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 99999)
    INSERT INTO executions (task_id, trigger, status, queued_at, started_at, finished_at, attempt, uuid)
    SELECT 1 + i % 1000, 'manual', CASE WHEN i % 37 = 0 THEN 'failed' ELSE 'succeeded' END, ?1 - (100000 - i) * 1000000, ?1 - (100000 - i) * 1000000, ?1 - (100000 - i) * 1000000 + 500000, 1,
        lower(hex(randomblob(16))) FROM n""", (now,))
db.commit()
`;
  execFileSync(python, ['-c', fill, join(folder, 'big.db'), String(Date.now())]);
  await big.start();
  try {
    const asked = [];
    const note = request => asked.push(request.url().slice(big.base.length).replace('#/', ''));
    let first; // what shows when more is asked for
    await page.route('**/api/v1/events', async route => {
      first ??= [await rows('Tasks').count(), await text('h1')];
      await route.continue();
    });
    page.on('request', note);
    const start = Date.now();
    await open(big);
    const loaded = Date.now() - start;
    page.off('request', note);
    await page.unroute('**/api/v1/events');
    equal(first, [30, 'Loading 1,000 tasks …'], 'the rows that fill a screen are there before the rest is asked for');
    equal(asked.slice(0, 4), ['/', '/api/v1/overview?limit=30', '/api/v1/scheduler/status', '/api/v1/events'], 'in this order');
    await shot('big');
    await page.getByRole('searchbox').fill('Task 77');
    const typed = await page.evaluate(async () => {
      const start = performance.now();
      document.querySelector('[data-param=q]').dispatchEvent(new Event('input', { bubbles: true }));
      while (document.querySelectorAll('#tasks tbody tr').length > 20) await new Promise(requestAnimationFrame);
      return performance.now() - start;
    });
    equal(await rows('Tasks').count(), 11, 'Task 77, 770 to 779');
    await page.getByRole('searchbox').fill('');
    await until(async () => await rows('Tasks').count() >= 100, 'the first page of rows');
    for (const n of [400, 700, 1000]) {
      await page.locator('#tasks + p button').click();
      await until(async () => await rows('Tasks').count() === n, `${n} rows`);
    }
    const id = (await big.ask('GET', '/tasks?q=Task 999')).tasks[0].id;
    const seen = Date.now();
    await big.run(id);
    await until(async () => (await rows('Tasks', 'Task 999').innerText()).includes('s ago'), 'a run shows among a thousand rows', 5);
    console.log(`# loaded in ${loaded} ms, a search shows after ${Math.round(typed)} ms, a run among 1,000 rows after ${Date.now() - seen} ms`);
    holds(loaded < 8000, `loading took ${loaded} ms`);
    holds(typed < 2000, `a search took ${typed} ms`);
    await open(big, '#/tasks/1');
    equal(await rows('Executions').count(), 50, 'the newest fifty');
    await button('Show older ones').click();
    await until(async () => await rows('Executions').count() === 100, 'a hundred');
  } finally {
    await page.goto('about:blank');
    await big.stop();
  }
});

// ---- Running them

mkdirSync(join(folder, 'shots'), { recursive: true });
service = await new Service(await freePort(), 'browser').start();
const browser = await chromium.launch({ executablePath: browserPath, args: FLAGS });
context = await browser.newContext({ viewport: { width: 1280, height: 900 }, timezoneId: 'Europe/Berlin' });
page = watch(await context.newPage());
let passed = 0, failed = 0;
try {
  for (const [name, check] of facts) {
    if (pattern && facts.findIndex(one => one[0] === name) > 1 && !new RegExp(pattern).test(name)) continue; // the first two make what others need
    complaints = [];
    const start = Date.now();
    const took = () => `(${((Date.now() - start) / 1000).toFixed(1)} s)`;
    try {
      await check();
      equal(complaints, [], 'complaints of the browser:');
      passed++;
      console.log(`ok ${name} ${took()}`);
    } catch (error) {
      failed++;
      console.log(`FAILED ${name} ${took()}: ${error.message}`);
      await page.screenshot({ path: join(folder, 'shots', `failed-${failed}.png`) }).catch(() => {});
    }
  }
} finally {
  await browser.close();
  await service.stop();
  await month?.stop();
}
console.log(`${passed} passed, ${failed} failed`);
process.exit(failed ? 1 : 0);
