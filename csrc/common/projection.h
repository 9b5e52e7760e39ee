// PCGrad's projections on the T x T Gram matrix of the tasks' gradients, for the host and for the device.
//
// Includes nothing but a macro, so that nvcc, a host compiler and a unit test can all take it. See
// mtlkernels/ops/pcgrad/reference.py for what it computes.
#pragma once

#include "host_device.h"

namespace mtlk {

struct ProjectionOptions {
  double max_norm;  // negative for none
  double eps;
  bool include_self, normalize, project;
};

// The squared norm's root, as a parameter because host and device have different ones.
template <typename Sqrt>
MTLK_HOST_DEVICE inline double clip_scale(double square, double max_norm, Sqrt root) {
  const double norm = root(square);
  return max_norm >= 0 && norm > max_norm ? max_norm / norm : 1.0;
}

// What each task's gradient is multiplied by before the projection: first clipped, then scaled to the mean norm.
template <typename Sqrt>
MTLK_HOST_DEVICE inline void projection_scales(const double* gram, int tasks, const ProjectionOptions& options,
                                               double* scale, Sqrt root) {
  double sum = 0;
  for (int i = 0; i < tasks; ++i) {
    const double square = gram[i * tasks + i];
    scale[i] = clip_scale(square, options.max_norm, root);
    sum += scale[i] * root(square);
  }
  if (!options.normalize) return;
  for (int i = 0; i < tasks; ++i) {
    const double norm = scale[i] * root(gram[i * tasks + i]);
    if (norm != 0) scale[i] *= sum / tasks / norm;
  }
}

// The coefficients of task i's projected gradient over the original gradients, in row[0, tasks). `order` holds the
// `steps` tasks that it is projected against; one out of range makes the row NaN.
template <typename Index>
MTLK_HOST_DEVICE inline void project_row(const double* gram, const double* scale, int tasks, int i, const Index* order,
                                         int steps, const ProjectionOptions& options, double* row) {
  for (int k = 0; k < tasks; ++k) row[k] = k == i ? 1.0 : 0.0;
  for (int s = 0; options.project && s < steps; ++s) {
    const Index j = order[s];
    if (j < 0 || j >= tasks) {
      for (int k = 0; k < tasks; ++k) row[k] = __builtin_nan("");
      continue;
    }
    if (j == i && !options.include_self) continue;
    const double square = scale[j] * gram[j * tasks + j] * scale[j];
    if (square == 0) continue;
    double inner = 0;
    for (int k = 0; k < tasks; ++k) {  // a task that has no part in it must not make it NaN
      if (row[k] != 0) inner += row[k] * (scale[k] * gram[j * tasks + k] * scale[j]);
    }
    if (inner < 0) row[j] -= inner / (square + options.eps);
  }
  for (int k = 0; k < tasks; ++k) row[k] *= scale[k];
}

}  // namespace mtlk
