"use strict";
const WORDS = {
  en: {
    title: "Blind comparison", left: "Left", right: "Right", upper: "Upper", lower: "Lower", tie: "Tie", back: "Back",
    next: "Forward", comment: "Comment", start: "Start", goon: "Go on", anew: "Another reader", sure: "Delete the answers in this browser and begin anew? Save them first.", prompt: "They were asked", name: "Your name",
    question: "Which reply sounds more like {who}?", them: "them", about: "How {who} really sounds",
    intro: "You will see {n} prompts, each with two replies. Choose the reply that sounds more like {who}, by voice and not by whether it is right. If you cannot tell, choose the tie.",
    kept: "Your answers stay in this browser, so you can close the page and go on later. Nothing is sent anywhere.",
    note: "Comment (optional; write it before you choose)", done: "That was all. Thank you!",
    summary: "{n} pairs: {l} × {left}, {r} × {right}, {t} × {tie}.",
    send: "Save the answers and give the file to whoever sent you this page. JSON or CSV, either will do.",
    json: "Save as JSON", csv: "Save as CSV", copy: "Copy", again: "Look through the answers",
    out: "The same as text, should saving not work here", said: "{choice}. Back changes it.", saved: "Saved as {file}.",
    copied: "Copied.", nocopy: "Copying is not allowed here: the text below is selected, copy it from there.",
    nostore: "This browser keeps nothing for this page: answer all pairs in one go and save the answers before closing it.",
    empty: "(no reply)", position: "Pair {i} of {n}", other: "中文",
  },
  zh: {
    title: "盲测", left: "左", right: "右", upper: "上", lower: "下", tie: "难分", back: "上一题",
    next: "下一题", comment: "备注", start: "开始", goon: "继续", anew: "换人作答", sure: "删除这个浏览器里的答案，重新开始？请先保存。", prompt: "提问", name: "你的名字",
    question: "哪个回答更像{who}？", them: "本人", about: "{who}平时怎么说话",
    intro: "一共 {n} 题，每题两个回答。请选更像{who}的那个：只看口吻，不看对错。实在分不出就选“难分”。",
    kept: "答案保存在这个浏览器里，可以关掉页面以后接着做。不会发送到任何地方。",
    note: "备注（可不填；先写备注再选）", done: "全部完成，谢谢！",
    summary: "共 {n} 题：{left} {l} 次，{right} {r} 次，{tie} {t} 次。",
    send: "请保存答案，把文件交给发给你这个页面的人。JSON 或 CSV 都可以。",
    json: "保存为 JSON", csv: "保存为 CSV", copy: "复制", again: "查看答案",
    out: "如果无法保存，可以复制这段文字", said: "已选：{choice}。可按“上一题”修改。", saved: "已保存为 {file}。",
    copied: "已复制。", nocopy: "此处不允许复制：下面的文字已选中，请手动复制。",
    nostore: "这个浏览器不会为此页面保存内容：请一次做完，并在关闭前保存答案。",
    empty: "（没有回答）", position: "第 {i} 题，共 {n} 题", other: "English",
  },
};
const FORMAT = "ab-answers-1";
const TOO_SOON = 250; // ms: the second click of a double click is not about the next pair

const $ = (id) => document.getElementById(id);
const sheet = JSON.parse($("sheet").textContent);
const items = sheet.pairs;
const store = "ab-sheet-" + sheet.sheet;
let state = { rater: "", answers: {}, comments: {}, language: "" };
let at = -1; // the pair that is shown; -1 before the first, items.length after the last
let shownAt = 0;

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(store));
    if (kept && kept.answers && kept.comments) state = { ...state, ...kept };
  } catch (error) { /* nothing kept, or storage forbidden: save() says so */ }
}

function save() {
  try {
    localStorage.setItem(store, JSON.stringify(state));
    return true;
  } catch (error) {
    $("trouble").textContent = word("nostore");
    $("trouble").hidden = false;
    return false;
  }
}

function language() {
  const chinese = sheet.language === "zh" || /^zh/i.test(navigator.language || "");
  return state.language || (chinese ? "zh" : "en");
}

function word(name, values) {
  const who = sheet.about || WORDS[language()].them;
  return WORDS[language()][name].replace(/\{(\w+)\}/g, (_, key) => ({ who, ...values })[key]);
}

function side(choice) {
  const narrow = { left: "upper", right: "lower" }[choice];
  return word(narrow && matchMedia("(max-width: 42rem)").matches ? narrow : choice);
}

const answered = () => items.filter((item) => state.answers[item.id]).length;
const times = (choice) => items.filter((item) => state.answers[item.id] === choice).length;
const firstOpen = () => items.findIndex((item) => !state.answers[item.id]);

function fill(element, text) {
  element.textContent = text || word("empty");
  element.classList.toggle("none", !text);
  element.lang = sheet.language;
}

function words() {
  document.documentElement.lang = language() === "zh" ? "zh-CN" : "en";
  document.title = word("title");
  for (const element of document.querySelectorAll("[data-t]")) element.textContent = word(element.dataset.t, { n: items.length });
  $("language").textContent = word("other");
  $("language").lang = language() === "zh" ? "en" : "zh-CN";
  for (const about of document.querySelectorAll(".about")) {
    about.hidden = !sheet.examples.length;
    about.querySelector("summary").textContent = word("about");
    about.querySelector("div").replaceChildren(...sheet.examples.map((text) => {
      const line = document.createElement("div");
      line.className = "said";
      line.lang = sheet.language;
      line.textContent = text;
      return line;
    }));
  }
}

function show() {
  for (const button of document.querySelectorAll(".anew")) button.hidden = !answered();
  $("begin").querySelector("button").textContent = word(answered() ? "goon" : "start");
  $("intro").hidden = at !== -1;
  $("pair").hidden = at < 0 || at >= items.length;
  $("done").hidden = at < items.length;
  document.body.className = $("pair").hidden ? "" : "asking";
  $("count").textContent = `${answered()} / ${items.length}`;
  $("bar").setAttribute("aria-valuemax", items.length);
  $("bar").setAttribute("aria-valuenow", answered());
  $("bar").firstElementChild.style.width = `${(100 * answered()) / items.length}%`;
  if (!$("pair").hidden) pair(items[at]);
  if (!$("done").hidden) finish();
}

function pair(item) {
  const choice = state.answers[item.id];
  fill($("prompt"), item.prompt);
  fill($("left"), item.left);
  fill($("right"), item.right);
  $("question").textContent = word("question");
  $("note").value = state.comments[item.id] || "";
  for (const button of document.querySelectorAll("#choices [data-choice]")) {
    button.setAttribute("aria-pressed", button.dataset.choice === choice);
  }
  for (const reply of document.querySelectorAll(".reply")) reply.classList.toggle("chosen", reply.dataset.choice === choice);
  $("back").disabled = at === 0;
  $("next").hidden = !choice;
  shownAt = performance.now();
}

function go(to) {
  at = to;
  show();
  scrollTo(0, 0);
  $("prompt").scrollTop = 0;
}

function choose(choice) {
  if (performance.now() - shownAt < TOO_SOON) return;
  state.answers[items[at].id] = choice;
  save();
  const open = items.findIndex((item, i) => i > at && !state.answers[item.id]);
  go(open >= 0 ? open : firstOpen() >= 0 ? firstOpen() : items.length);
  $("said").textContent = word("said", { choice: side(choice) }) + " " + word("position", { i: Math.min(at + 1, items.length), n: items.length });
}

function back() {
  if (at > 0) go(at - 1);
  $("said").textContent = word("position", { i: at + 1, n: items.length });
}

function result() {
  return {
    format: FORMAT,
    sheet: sheet.sheet,
    rater: state.rater,
    answers: items.filter((item) => state.answers[item.id])
      .map((item) => ({ id: item.id, choice: state.answers[item.id], comment: state.comments[item.id] || "" })),
  };
}

const asJson = () => JSON.stringify(result(), null, 1) + "\n";

function asCsv() {
  const cell = (text) => `"${text.replace(/"/g, '""')}"`;
  const all = result();
  const rows = all.answers.map((answer) => [all.sheet, all.rater, answer.id, answer.choice, answer.comment].map(cell).join(","));
  return "\ufeff" + ["sheet,rater,id,choice,comment", ...rows].join("\r\n") + "\r\n"; // the mark tells Excel that this is UTF-8
}

function download(ending, type, text) {
  const rater = state.rater.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = ["answers", sheet.sheet, rater].filter(Boolean).join("-") + ending;
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  $("saved").textContent = word("saved", { file: link.download });
}

function copy() {
  const byHand = () => {
    $("out").select();
    $("saved").textContent = word(document.execCommand("copy") ? "copied" : "nocopy");
  };
  if (!navigator.clipboard) return byHand();
  return navigator.clipboard.writeText($("out").value).then(() => { $("saved").textContent = word("copied"); }, byHand);
}

function finish() {
  $("rater2").value = state.rater;
  $("summary").textContent = word("summary", {
    n: items.length, l: times("left"), r: times("right"), t: times("tie"), left: side("left"), right: side("right"), tie: side("tie"),
  });
  $("out").value = asJson();
}

function typing(target) {
  return target.matches("input, textarea");
}

const KEYS = { ArrowLeft: "left", "1": "left", ArrowRight: "right", "2": "right", "0": "tie", "=": "tie", t: "tie" };

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.isComposing) return;
  if (event.key === "Escape" && event.target === $("note")) $("note").blur();
  if (typing(event.target) || $("pair").hidden && $("done").hidden) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key === "Backspace" || key === "u") back();
  else if ($("pair").hidden) return;
  else if (KEYS[key]) choose(KEYS[key]);
  else if (key === "c") $("note").focus();
  else return;
  event.preventDefault();
}

function named(input) {
  state.rater = input.value.trim();
  save();
}

document.addEventListener("keydown", pressed);
for (const button of document.querySelectorAll("#choices [data-choice]")) button.addEventListener("click", () => choose(button.dataset.choice));
$("back").addEventListener("click", back);
$("next").addEventListener("click", () => go(at + 1 < items.length || firstOpen() < 0 ? at + 1 : firstOpen()));
$("again").addEventListener("click", () => go(0));
$("json").addEventListener("click", () => download(".json", "application/json", asJson()));
$("csv").addEventListener("click", () => download(".csv", "text/csv", asCsv()));
$("copy").addEventListener("click", copy);
$("note").addEventListener("input", () => { state.comments[items[at].id] = $("note").value.trim(); save(); });
$("rater2").addEventListener("input", () => { named($("rater2")); $("out").value = asJson(); });
$("rename").addEventListener("submit", (event) => event.preventDefault());
$("begin").addEventListener("submit", (event) => {
  event.preventDefault();
  named($("rater"));
  go(firstOpen() < 0 ? items.length : firstOpen());
});
for (const button of document.querySelectorAll(".anew")) {
  button.addEventListener("click", () => {
    if (!confirm(word("sure"))) return;
    state = { ...state, rater: "", answers: {}, comments: {} };
    save();
    $("rater").value = "";
    $("saved").textContent = "";
    go(-1);
  });
}
$("language").addEventListener("click", () => {
  state.language = language() === "zh" ? "en" : "zh";
  save();
  words();
  $("said").textContent = "";
  show();
});
addEventListener("storage", (event) => { // the same sheet, answered in another tab
  if (event.key !== store || !event.newValue) return;
  load();
  show();
});

load();
words();
save();
$("rater").value = state.rater;
go(firstOpen() < 0 ? items.length : -1);
if (at === -1) $("rater").focus();
