# SPDX-License-Identifier: BSD-3-Clause
#
# results.json -> data for plot.gp.  First the bars: x, ratio, min, max, goal
# or NaN, 1 (vmrep) or 2 (others), target.  Then the groups of bars: x of the
# middle, workload.

# Bars of one workload stand side by side, with a gap before the next one's.
[.rows[] | select(.ratio)]
| reduce .[] as $row ({x: 0.4, workload: null, bars: []};
    .x += (if .workload == $row.workload then 1 else 1.6 end)
    | .workload = $row.workload
    | .bars += [$row + {x: .x}])
| .bars
| (.[] | [.x, .ratio.median, .ratio.min, .ratio.max, (.ratio_goal // "NaN"),
          (if .target == "mirror" then 2 else 1 end),
          "\"\(.target | sub("-"; "\\n"))\""]
       | map(tostring) | join(" ")),
  "", "",
  (group_by(.workload)[]
   | "\((.[0].x + .[-1].x) / 2) \"\(.[0].workload)\"")
