"""The report's style sheet: one column of sections, light and dark, legible when printed."""

CSS = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1d1f23; --soft: #6a6f78;
  --line: #e3e3df; --accent: #3f7fe0; --second: #e0762f; --good: #2b8a6b; }
@media (prefers-color-scheme: dark) { :root { --page: #131417; --card: #1b1d21; --ink: #e7e8ea;
  --soft: #979ca6; --line: #2d3036; --accent: #6ea0f0; --second: #f0945a; --good: #5cc0a0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 6px; font-weight: 650; }
h2 { font-size: 19px; letter-spacing: -0.01em; margin: 44px 0 4px; font-weight: 650; }
h3 { font-size: 14.5px; margin: 0; font-weight: 600; }
p { margin: 0; }
.soft { color: var(--soft); font-size: 13.5px; }
.lead { font-size: 17px; max-width: 52em; margin-top: 12px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px;
  margin-top: 24px; }
.card, .panel, .picture, .table { background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
.card { padding: 14px 18px 15px; }
.card .value { font-size: 29px; line-height: 1.25; font-weight: 650; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.card .name { color: var(--soft); font-size: 13px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 18px;
  margin-top: 14px; }
.picture { margin: 0; padding: 14px; }
.picture + .picture.wide { margin-top: 14px; }
.picture.wide { margin-top: 14px; overflow-x: auto; }
figcaption { display: flex; justify-content: space-between; align-items: baseline; gap: 12px;
  margin-bottom: 10px; }
figcaption b { font-weight: 600; }
figcaption span { color: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; border-radius: 4px; }
.pair img { margin: 0 auto; }
.strip { display: grid; grid-template-columns: max-content 1fr; gap: 8px 18px; align-items: center; }
.strip span { color: var(--soft); font-size: 13px; text-align: right; font-variant-numeric: tabular-nums; }
.table { margin-top: 14px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 9px 18px; text-align: right; border-top: 1px solid var(--line); vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: 13px; vertical-align: bottom; }
tbody th { font-weight: 600; }
tr.generator th { color: var(--accent); }
tr.generator td { font-weight: 600; }
.facts td { text-align: left; font-size: 13.5px; overflow-wrap: anywhere; padding: 5px 18px; }
.facts tr:first-child td { border-top: 0; padding-top: 9px; }
.facts tr:last-child td { padding-bottom: 9px; }
.facts td:first-child { color: var(--soft); width: 15em; overflow-wrap: normal; }
.protocol { margin-top: 9px; }
.protocol span:not(:last-child)::after { content: " · "; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 18px;
  margin-top: 14px; }
.panel { padding: 15px 18px 13px; display: flex; flex-direction: column; }
.panel svg { display: block; width: 100%; height: auto; margin: 8px 0 4px; color: var(--ink);
  font-family: inherit; }
.panel .soft { font-size: 13px; line-height: 1.45; margin-top: 2px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; margin-top: auto; }
.legend i { display: inline-block; width: 14px; height: 3px; border-radius: 2px; vertical-align: middle;
  margin-right: 6px; }
.legend em { font-style: normal; color: var(--soft); font-variant-numeric: tabular-nums; margin-left: 5px; }
.warning { color: var(--second); font-size: 13px; }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 13px 18px;
  margin: 14px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: 14px; }
summary { cursor: pointer; font-weight: 600; }
summary span { color: var(--soft); font-weight: 400; font-size: 13.5px; margin-left: 6px; }
footer { margin-top: 56px; color: var(--soft); font-size: 13px; }
@media print { body { background: #fff; } main { padding: 0; }
  .panel, .picture, .card { break-inside: avoid; } }
"""
