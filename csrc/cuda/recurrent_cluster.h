// The recurrent layers by clusters (sm_90 and up): as the persistent path, but a cluster holds all of
// W_hh and takes a slice of the batch, so that a step needs no barrier of several clusters. Its blocks
// send each other what the next step needs by bulk copies into each other's shared memory, which count
// bytes at an mbarrier.
#pragma once
#include "ops/recurrent.h"

namespace lmkern::cuda {

// Whether the path was taken.
template <class S>
bool recurrent_forward_cluster(const RecurrentForwardArgs& args);
template <class S>
bool recurrent_backward_cluster(const RecurrentBackwardArgs& args);

}  // namespace lmkern::cuda
