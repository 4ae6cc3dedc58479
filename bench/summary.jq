# SPDX-License-Identifier: BSD-3-Clause
#
# runs.jsonl -> results.json.  A ratio is taken within one round, between two
# measurements made within a minute, so that a slow spell of the machine hits
# both; the median over rounds is what counts.

# At least so much of what plain `nbdkit file` does.
def ratio_goals: {
  "write-4k-q1 vmrep": 0.95,
  "write-4k-q32 vmrep": 0.70,
  "write-64k-q16 vmrep": 0.60,
  "read-4k-q32 vmrep": 0.95,
  "flush-4k vmrep": 1.0,
  "flush-4k vmrep-remote": 0.65,
  "flush-4k vmrep-epoch": 2.0
};

# At most so many milliseconds from a write to its commit.
def commit_goals: {
  p50: ($meta.interval_ms + 5),
  p99: (2 * $meta.interval_ms + 10)
};

def median:
  sort | length as $n
  | if $n == 0 then null
    elif $n % 2 == 1 then .[($n - 1) / 2]
    else (.[$n / 2 - 1] + .[$n / 2]) / 2 end;

def spread: {median: median, min: min, max: max};

# Runs in the order of their first appearance, grouped by f.
def group_in_order(f): reduce .[] as $run ({order: [], groups: {}};
    ($run | f) as $key
    | if .groups[$key] then . else .order += [$key] end
    | .groups[$key] += [$run])
  | . as $all | .order | map($all.groups[.]);

def key: "\(.workload) \(.target)";

. as $runs
| (map(select(.target == "file") | {("\(.round) \(.workload)"): .iops})
   | add) as $file_iops
| group_in_order(.workload)
| map(sort_by(.target | . != "file", startswith("vmrep") != true, .)
      | group_in_order(.target)[])
| map(. as $same | .[0] | key as $key | {
    workload, target,
    ratio: (if .target == "file" then null
            else $same | map(.iops / $file_iops["\(.round) \(.workload)"])
                 | spread end),
    ratio_goal: ratio_goals[$key],
    iops: ($same | map(.iops) | spread),
    mib_per_s: ($same | map(.bytes_per_s / 1048576) | median),
    latency_p50_us: ($same | map(.latency_us.p50) | median),
    latency_p99_us: ($same | map(.latency_us.p99) | median),
    flush_p50_us: ($same | map(.flush_us.p50 // empty) | median),
    flush_p99_us: ($same | map(.flush_us.p99 // empty) | median),
    server_us_per_op: ($same | map(.server_us_per_op) | median),
    journal_passes: ($same | map(.journal_passes // empty) | median),
    drain_s: ($same | map(.drain_s) | median),
    peak_rss_bytes: ($same[0].server_rss_bytes | keys_unsorted
      | map(. as $name | {($name): ($same
          | map(.server_rss_bytes[$name]) | max)}) | add)
  } | if .ratio and .ratio_goal
      then .met = (.ratio.median >= .ratio_goal) else . end)
| {
    meta: $meta,
    background_cpus: ($runs | map(.background_cpus) | spread),
    rows: .,
    commit: ($runs | map(.commits // empty)
      | if length == 0 then null else {
          commits: (map(.commits) | add),
          missed: (map(.missed) | add),
          # From the cut of an epoch to its commit.
          from_cut_ms: {p50: (map(.commit_ms.p50) | spread),
                        p99: (map(.commit_ms.p99) | spread),
                        max: (map(.commit_ms.max) | max)},
          # From the oldest write an epoch can hold to its commit.
          from_write_ms: {p50: (map(.age_ms.p50) | spread),
                          p99: (map(.age_ms.p99) | spread),
                          max: (map(.age_ms.max) | max)},
          goals_ms: commit_goals
        } | .met = {p50: (.from_write_ms.p50.median <= .goals_ms.p50),
                    p99: (.from_write_ms.p99.median <= .goals_ms.p99)}
        end)
  }
