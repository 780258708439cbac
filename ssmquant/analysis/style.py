"""The style sheet and the script of a report's page: nothing in them comes from a model."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root{--bg:#fff;--fg:#1b1f24;--dim:#59636e;--line:#d1d9e0;--soft:#f4f6f8;--bar:#8c959f;--level:#c2410c;--range:#fde3d3;
--q0:#d55e00;--q1:#e69f00;--q2:#999;--q3:#56b4e9;--q4:#0072b2}
@media (prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e6e9ec;--dim:#9aa4ae;--line:#3a4149;--soft:#1e2328;
--bar:#77818b;--level:#ff9d5c;--range:#4a2f1f;--q4:#3d9be0}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1400px;padding:1rem;background:var(--bg);color:var(--fg);
font:15px/1.45 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.2rem;margin:1.6rem 0 .5rem}
h3{font-size:.95rem;margin:0 0 .4rem;font-family:ui-monospace,monospace;overflow-wrap:anywhere}
a{color:inherit}code,pre{font:13px/1.4 ui-monospace,monospace}
pre{background:var(--soft);padding:.6rem;overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere}
small,.dim{color:var(--dim)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:.5rem 0}dt{color:var(--dim)}dd{margin:0}
.wide{overflow:auto;max-height:85vh;border:1px solid var(--line)}
table{border-collapse:collapse;font-size:13px;width:100%}
th,td{padding:.15rem .5rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{position:sticky;top:0;background:var(--soft);white-space:nowrap;z-index:1}
tbody th{font-weight:normal;font-family:ui-monospace,monospace;overflow-wrap:anywhere;min-width:16rem}
td.m{white-space:nowrap}td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
thead button{font:inherit;font-weight:bold;color:inherit;background:none;border:0;padding:0;cursor:pointer}
th[aria-sort=ascending] button:after{content:" \\25B2"}th[aria-sort=descending] button:after{content:" \\25BC"}
.b{display:inline-block;width:50px;height:.65em;background:var(--soft);margin-right:.4em;text-align:left}
.b i{display:block;height:100%;background:var(--bar)}
.b .q0,.k.q0{background:var(--q0)}.b .q1,.k.q1{background:var(--q1)}.b .q2,.k.q2{background:var(--q2)}
.b .q3,.k.q3{background:var(--q3)}.b .q4,.k.q4{background:var(--q4)}
.k{display:inline-block;width:.9em;height:.9em;margin:0 .3em 0 .8em;vertical-align:-.1em}
section.s{content-visibility:auto;contain-intrinsic-size:auto 190px;border-top:1px solid var(--line);padding:.5rem 0}
.g{display:flex;flex-wrap:wrap;gap:.6rem}
figure{margin:0;width:270px;padding:5px;background:var(--soft);font-size:12.5px;overflow-wrap:anywhere}
figcaption b{font-family:ui-monospace,monospace}
svg{display:block;width:260px;height:92px}
svg .h{fill:var(--bar)}svg .r{fill:var(--range)}svg .l{stroke:var(--level);stroke-width:1;fill:none}
svg .t{stroke:var(--fg);stroke-width:1.5;fill:none}svg text{font:10px system-ui,sans-serif;fill:var(--dim)}
svg .e{text-anchor:end}
#filter{display:none;margin:.4rem 0}.js #filter{display:block}
@media print{.wide{max-height:none;overflow:visible}#filter{display:none!important}}
"""
"""SQNR goes from vermilion over grey to blue (Okabe and Ito's colours): readable without red and green."""

SCRIPT = """
(function(){
"use strict";
var table=document.getElementById("sites");
if(!table)return;
document.documentElement.className="js";
var body=table.tBodies[0],rows=Array.prototype.slice.call(body.rows),heads=table.tHead.rows[0].cells;
function key(row,i){var c=row.cells[i];return c.hasAttribute("data-v")?c.getAttribute("data-v"):c.textContent;}
function sort(i,head){
var up=head.getAttribute("aria-sort")!=="ascending",numeric=head.hasAttribute("data-n"),order=rows.slice();
order.sort(function(a,b){
var x=key(a,i),y=key(b,i);
if(x===""||y==="")return (x==="")-(y==="");
var d=x===y?0:numeric?x-y:x.localeCompare(y,undefined,{numeric:true});
return up?d:-d;});
for(var k=0;k<heads.length;k++)heads[k].removeAttribute("aria-sort");
head.setAttribute("aria-sort",up?"ascending":"descending");
order.forEach(function(r){body.appendChild(r);});}
Array.prototype.forEach.call(heads,function(head,i){
var button=document.createElement("button");
button.type="button";button.textContent=head.textContent;head.textContent="";head.appendChild(button);
button.addEventListener("click",function(){sort(i,head);});});
var box=document.getElementById("word"),count=document.getElementById("count");
function filter(){
var words=box.value.toLowerCase().split(/\\s+/),n=0;
rows.forEach(function(r){
var t=r.textContent.toLowerCase(),on=words.every(function(w){return t.indexOf(w)>=0;});
r.hidden=!on;n+=on;
var s=document.getElementById("s"+r.id.slice(1));if(s)s.hidden=!on;});
count.textContent=n+" of "+rows.length;}
box.addEventListener("input",filter);filter();
})();
"""
"""Sorting by column and a filter. Numbers without a value come last; "Infinity" sorts as the number it is."""
