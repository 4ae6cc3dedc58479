# SPDX-License-Identifier: BSD-3-Clause
#
# results.json -> the report on the terminal.

def left($n): tostring | . + " " * ([$n - length, 0] | max);
def right($n): tostring | " " * ([$n - length, 0] | max) + .;
def fixed($digits):
  pow(10; $digits) as $unit | . * $unit | round | tostring
  | (if startswith("-") then "-" else "" end) as $sign | ltrimstr("-")
  | "0" * ([$digits + 1 - length, 0] | max) + .
  | $sign + if $digits == 0 then .
    else .[:length - $digits] + "." + .[length - $digits:] end;
def spread_text($digits):
  "\(.min | fixed($digits))..\(.max | fixed($digits))";
def verdict: if . == null then "" elif . then "met" else "MISSED" end;

def heading: ("workload" | left(14)) + ("target" | left(13))
  + ("ratio" | right(6)) + ("min..max" | right(13)) + ("goal" | right(6))
  + " " + ("" | left(7)) + ("IOPS" | right(8)) + ("MiB/s" | right(7))
  + ("p50 µs" | right(9)) + ("p99 µs" | right(9)) + ("CPU µs" | right(8))
  + ("wraps" | right(7));

def row: (.workload | left(14)) + (.target | left(13))
  + ((if .ratio then .ratio.median | fixed(2) else "1.00" end) | right(6))
  + ((if .ratio then .ratio | spread_text(2) else "" end) | right(13))
  + ((if .ratio_goal then .ratio_goal | fixed(2) else "" end) | right(6))
  + " " + (.met | verdict | left(7))
  + (.iops.median | fixed(0) | right(8)) + (.mib_per_s | fixed(0) | right(7))
  + ((.flush_p50_us // .latency_p50_us) | fixed(0) | right(9))
  + ((.flush_p99_us // .latency_p99_us) | fixed(0) | right(9))
  + (.server_us_per_op | fixed(1) | right(8))
  + ((if .journal_passes then .journal_passes | fixed(1) else "" end)
     | right(7));

def commit_row($name; $goal; $met): ($name | left(34))
  + (.median | fixed(1) | right(8)) + (spread_text(1) | right(15))
  + ($goal | right(7)) + "  " + ($met | verdict);

(.meta | "", "\(.commit)  \(.date)  \(.cpu), \(.cpus) CPUs, \(.kernel)",
  "\(.rounds) rounds of \(.seconds) s, journals of "
  + "\(.journal_bytes / 1048576) MiB, epochs of \(.interval_ms) ms", ""),
heading, (.rows[] | row),
(.commit // empty | . as $c | "",
  ("commit under write-4k-q32, ms" | left(34)) + ("median" | right(8))
  + ("min..max" | right(15)) + ("goal" | right(7)),
  (.from_write_ms.p50 | commit_row("oldest write to commit, p50";
                                   $c.goals_ms.p50; $c.met.p50)),
  (.from_write_ms.p99 | commit_row("oldest write to commit, p99";
                                   $c.goals_ms.p99; $c.met.p99)),
  (.from_cut_ms.p50 | commit_row("cut to commit, p50"; ""; null)),
  (.from_cut_ms.p99 | commit_row("cut to commit, p99"; ""; null)),
  "\(.commits) commits, \(.missed) came too fast to be seen"),
"",
([.rows[] | select(.target | startswith("vmrep")) | .peak_rss_bytes]
 | if length == 0 then empty else
     "peak memory of vmrep: primary "
     + "\(map(.primary) | max / 1048576 | fixed(0)) MiB, backup "
     + "\(map(.backup) | max / 1048576 | fixed(0)) MiB" end),
(.background_cpus | select(.median > 0.1)
 | "NOTE: the machine was not quiet: others kept \(.median | fixed(2)) CPUs "
   + "busy (\(spread_text(2)))")
