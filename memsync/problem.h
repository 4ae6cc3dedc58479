/* SPDX-License-Identifier: BSD-3-Clause */
/* Why something in this folder failed, in a sentence for people. */
#ifndef VR_PROBLEM_H
#define VR_PROBLEM_H

struct vr_problem {
  char text[512];
};

/* Fill in *p (which may be NULL) and return err, so that
     return vr_problem (p, -EBUSY, "…", …);
   does both. */
int vr_problem (struct vr_problem *p, int err, const char *format, ...)
  __attribute__ ((format (printf, 3, 4)));

#endif /* VR_PROBLEM_H */
