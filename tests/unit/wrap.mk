# SPDX-License-Identifier: BSD-3-Clause
#
# Functions that a unit test replaces with its own __wrap_ versions, by the
# name of the test, for example:
#
#   test-index_WRAP = malloc realloc

test-map_WRAP = malloc realloc calloc

# Nobody else runs in the simulator: who waits there has waited long enough.
test-crash_WRAP = pthread_cond_timedwait
