# SPDX-License-Identifier: BSD-3-Clause
#
# gnuplot -e "data='FILE'; out='PATH'; note='TEXT'" plot.gp
# Draws the ratios to plain `nbdkit file`, from what plot.jq makes.

set title "Requests per second, compared with plain nbdkit file\n".note \
  noenhanced
set ylabel "ratio (median of rounds)"
stats data index 0 using 1 name "x" nooutput
stats data index 0 using 4 name "y" nooutput
set xrange [x_min - 0.8:x_max + 0.8]
set yrange [0:(y_max > 1.1 ? y_max : 1.1) * 1.15]
set border 3
set tics nomirror
set xtics scale 0 noenhanced
set grid ytics back lt 1 lc rgb "#e4e4e4"
set boxwidth 0.8
set style fill solid 1.0 noborder
set key outside right top reverse Left samplen 2
set bmargin 6

colour(kind) = kind == 2 ? 0x9aa5b1 : 0x2f6fb3

# Above the bar and its whisker, and not on the line of the goal.
label_at(max, goal) = goal > max - 0.05 && goal < max + y_max * 0.1 ? goal : max

plot_all = "plot \
  data index 0 using 1:2:(colour($6)):xtic(stringcolumn(7)) \
    with boxes lc rgb variable notitle, \
  NaN with boxes lc rgb 0x2f6fb3 title 'vmrep', \
  NaN with boxes lc rgb 0x9aa5b1 title 'QEMU mirror', \
  1 lc rgb '#333333' dt 2 title 'nbdkit file', \
  data index 0 using ($1-0.45):5:(0.9):(0) with vectors nohead lw 4 \
    lc rgb '#d0342c' title 'to reach', \
  data index 0 using 1:3:(0):($4-$3) with vectors heads size 0.12,90 lw 1.5 \
    lc rgb '#222222' title 'min to max', \
  data index 0 using 1:(label_at($4, $5)):(sprintf('%.2f', $2)) with labels \
    offset 0,0.8 notitle, \
  data index 1 using 1:(0):2 with labels offset 0,-3.9 notitle"

set terminal svg size 1100,520 font "sans,13"
set output out.".svg"
eval plot_all
set terminal pngcairo size 1100,520 font "sans,11"
set output out.".png"
eval plot_all
