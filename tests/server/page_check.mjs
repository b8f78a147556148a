// The page in a real browser: chat streams, stop works, plan and load are shown, at 400 and 1400
// pixels. Screenshots, light and dark, go to FOLDER.
// Usage: node page_check.mjs PROGRAM MODEL FOLDER
import { existsSync, mkdirSync } from "node:fs";
import { join } from "node:path";
import { chromium } from "playwright-core";
import { check, checksPassed, startServer } from "./start_server.mjs";

const [program, model, folder] = process.argv.slice(2);
const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
if (!existsSync(executablePath)) {
  console.log(`page_check: skipped: ${executablePath} is not there`);
  process.exit(0);
}
mkdirSync(folder, { recursive: true });
const server = await startServer(program, ["-m", model, "-c", "8192", "-t", "2", "--plan", "1/4", "--api-key", "secret"]);
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-dev-shm-usage"] });
try {
  for (const [width, height] of [[1400, 900], [400, 800]]) {
    const page = await browser.newPage({ viewport: { width, height } });
    page.setDefaultTimeout(60000);
    const problems = [];
    page.on("pageerror", (error) => problems.push(error.message));
    page.on("console", (message) => { if (message.type() === "error" && !message.text().includes("401")) problems.push(message.text()); });
    // The model must not end an answer before it is stopped.
    await page.route("**/v1/chat/completions", (route) =>
      route.continue({ postData: JSON.stringify({ ...route.request().postDataJSON(), ignore_eos: true }) }));
    const screenshots = async (name) => {
      for (const colorScheme of ["light", "dark"]) {
        await page.emulateMedia({ colorScheme });
        await page.screenshot({ path: join(folder, `${name}-${width}-${colorScheme}.png`) });
      }
    };
    await page.goto(server.url);
    await page.getByLabel("API key").fill("secret");
    await page.getByLabel("API key").press("Tab");
    const narrow = width < 760;
    const brief = page.locator("summary");
    check(await brief.isVisible() === narrow, "plan and load are a line on a narrow window");
    if (narrow) await brief.click();
    await page.waitForSelector(".plan b");
    const letters = await page.locator(".plan b").allTextContents();
    check(letters.length === 24 && letters.filter((letter) => letter === "F").length === 7, "the plan", letters.join(""));
    await page.waitForSelector(".state.ok");
    if (narrow) await brief.click();
    check(await page.locator("#load").isVisible() !== narrow, "the line opens and closes");

    await page.getByLabel("max tokens").fill("40");
    await page.getByLabel("Message").fill("Tell me about the indexer.\nIn two lines.");
    await page.getByLabel("Message").press("Enter");
    await page.waitForFunction(() => document.querySelector(".turn.assistant")?.textContent.length > 0);
    await page.waitForFunction(() => document.querySelector(".turn.assistant small")?.textContent.includes("tokens, first after"));
    check((await page.locator(".turn.error").count()) === 0, "no error turn");

    await page.getByLabel("max tokens").fill("6000");
    await page.getByLabel("Message").fill("Go on for long.");
    await page.getByRole("button", { name: "Send" }).click();
    const second = page.locator(".turn.assistant").nth(1);
    await page.waitForFunction(() => document.querySelectorAll(".turn.assistant")[1]?.textContent.length > 20);
    check(await page.getByRole("button", { name: "Stop" }).isVisible(), "the button stops");
    // The rate is measured once a second.
    await page.waitForFunction(() => /now [1-9]/.test(document.querySelector("#rate-text").textContent));
    check(await page.getByLabel("Message").isVisible() && await page.evaluate(() => document.documentElement.scrollHeight <= innerHeight), "the answer scrolls, the page does not");
    await screenshots("running");
    await page.getByRole("button", { name: "Stop" }).click();
    await page.waitForFunction(() => document.querySelector("#send").textContent === "Send");
    const kept = (await second.textContent()).length;
    check((await second.locator("small").textContent()) === "stopped", "the page says that it was stopped");
    await page.waitForTimeout(600);
    check((await second.textContent()).length === kept, "nothing comes after stop");
    await page.waitForFunction(() => [...document.querySelectorAll("dt")].some((dt) => dt.textContent === "running" && dt.nextElementSibling.textContent === "0"));
    check((await page.locator("dd").count()) === 7, "load is shown");
    check((await page.locator("#rate-line").getAttribute("d")).length > 5, "the rate is drawn");
    const overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    check(overflow <= 0, "nothing is wider than the window", overflow);
    if (narrow) await brief.click();
    await screenshots("stopped");
    await page.getByRole("button", { name: "New chat" }).click();
    check((await page.locator(".turn").count()) === 0 && await page.locator("#hint").isVisible(), "a new chat is empty");
    check(problems.length === 0, "scripts run without errors", problems);
    await page.close();
  }
  await browser.close();
  check((await server.stop()).code === 0, "exit code");
  console.log(`page_check: ${checksPassed()} checks passed, screenshots in ${folder}`);
} catch (error) {
  console.error(error, "\n", server.log());
  process.exitCode = 1;
  await browser.close();
  server.child.kill("SIGKILL");
}
