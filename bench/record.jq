# SPDX-License-Identifier: BSD-3-Clause
#
# fio's report of one measurement -> one line of runs.jsonl.  A request is a
# read or a write; in flush-4k each write's flush belongs to its request.

def percentiles: {
  p50: ((.percentile["50.000000"] // 0) / 1000),
  p99: ((.percentile["99.000000"] // 0) / 1000)
};

.jobs[0] as $job
| (if $job.write.total_ios > 0 then $job.write else $job.read end) as $io
| {
    round: $round, workload: $workload, target: $target,
    iops: $io.iops,
    bytes_per_s: $io.bw_bytes,
    latency_us: ($io.clat_ns | percentiles),
    flush_us: (if $job.sync.total_ios > 0
               then $job.sync.lat_ns | percentiles else null end),
    server_us_per_op: ($cpu_s * 1e6 / $io.total_ios),
    server_rss_bytes: $rss,
    # How often vmrep's journals were filled: below 1 is not a steady state.
    journal_passes: (if ($target | startswith("vmrep"))
                     then $job.write.io_bytes / $journal else null end),
    # From the end of the load until all was committed and applied; 0.4 s of
    # it is watching that it stays so.
    drain_s: $drain_s,
    # CPUs that others kept busy before this measurement.
    background_cpus: $background,
    commits: $commits[0]
  }
