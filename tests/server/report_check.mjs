// The report in a real browser: made by the real commands from a short search, it loads nothing from
// a network, draws every chart, and can be read in light and dark at 400 and 1400 pixels.
// Usage: node report_check.mjs PROGRAM MODEL FOLDER
import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";
import { check, checksPassed } from "./start_server.mjs";

const [program, model, folder] = process.argv.slice(2);
const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
if (!existsSync(executablePath)) {
  console.log(`report_check: skipped: ${executablePath} is not there`);
  process.exit(0);
}
rmSync(folder, { recursive: true, force: true });
mkdirSync(folder, { recursive: true });
const at = (name) => join(folder, name);
const text = ["-f", join(model, "heldout.jsonl")];
const indexcache = (...words) => execFileSync(program, words, { stdio: ["ignore", "ignore", "pipe"] });
indexcache("search", "-m", model, ...text, "--seq", "256", "--tokens", "512", "--fast", "--keep", "20", "-o", at("plan.json"));
indexcache("overlap", "-m", model, ...text, "--seq", "512", "--tokens", "1024", "--json", "-o", at("overlap.json"));
indexcache("eval", "-m", model, ...text, "--seq", "512", "--tokens", "1024", "--plans", "all,1/4",
  "--variant", `searched=${at("plan.json")}`, "--json", "-o", at("eval.json"));
indexcache("bench", "-m", model, "--contexts", "256,512", "--plans", "all,1/4", "--json", "-o", at("bench.json"));
indexcache("report", at("plan.json"), at("overlap.json"), at("eval.json"), at("bench.json"), "--title", "A short search", "-o", at("report.html"));

// Contrast of WCAG 2, from two computed colours.
const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
  .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-dev-shm-usage"] });
try {
  for (const width of [1400, 400]) {
    for (const colorScheme of ["light", "dark"]) {
      const page = await browser.newPage({ viewport: { width, height: 900 }, colorScheme });
      const problems = [], requests = [];
      page.on("pageerror", (error) => problems.push(error.message));
      page.on("console", (message) => { if (message.type() === "error") problems.push(message.text()); });
      page.on("request", (request) => requests.push(request.url()));
      await page.goto(pathToFileURL(at("report.html")).href);
      check(problems.length === 0, "no errors in the console", problems);
      check(requests.length === 1, "nothing else is loaded", requests);
      const charts = await page.locator("svg").evaluateAll((all) => all.map((svg) => ({
        width: svg.getBoundingClientRect().width, marks: svg.querySelectorAll("path, polyline, circle, rect, line").length })));
      check(charts.length === 4, "charts of search, overlap, cost and speed", charts);
      for (const chart of charts) check(chart.width > 100 && chart.marks > 5, "a chart is drawn", chart);
      check((await page.locator("table tr").count()) > 6, "tables");
      const commands = (await page.locator("pre").allTextContents()).join("\n");
      for (const name of ["search", "overlap", "eval", "bench"]) {
        check(commands.includes(`indexcache ${name} -m `), "the command that made it", name, commands);
      }
      const overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
      check(overflow <= 0, "the page is not wider than the window", width, overflow);
      const colours = await page.locator("h1, h2, p, td, th").evaluateAll((all) => all.map((element) => {
        let behind = element;
        while (behind && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        const numbers = (colour) => colour.match(/[\d.]+/g).slice(0, 3).map(Number);
        return { text: element.textContent.trim().slice(0, 40), ink: numbers(getComputedStyle(element).color),
          paper: numbers(behind ? getComputedStyle(behind).backgroundColor : "rgb(255, 255, 255)") };
      }));
      for (const { text, ink, paper } of colours) {
        check(contrast(ink, paper) >= 4.5, "text can be read", colorScheme, text, ink, paper);
      }
      await page.screenshot({ path: at(`report-${width}-${colorScheme}.png`), fullPage: true });
      await page.close();
    }
  }
  console.log(`report_check: ${checksPassed()} checks passed, screenshots in ${folder}`);
} catch (error) {
  console.error(error);
  process.exitCode = 1;
}
await browser.close();
