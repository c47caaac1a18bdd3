// Autocast's cache of casts, as far as it can be told from outside.
//
// Note [Cached casts]
//
//   with torch.autocast("cuda", torch.bfloat16):
//       loss.backward()           # replays a segment that ran under float16
//
// Autocast keeps the casts of weights, by weight alone and for the whole process, and
// forgets them where the outermost of a thread's contexts ends. A replay in the context
// of its forward (a backward inside of a checkpointed function, or of the context) finds
// what the forward found and made, and has to: what is cast once has one history, and a
// second cast would round the sum of its gradients elsewhere. A replay in any other
// context would find casts to another dtype, and leave its own there. So it begins with
// an empty cache and leaves one, and contexts inside of fn are outermost if they were in
// the forward. Only a replay for a backward inside of fn, in a context of fn's, goes
// without the cache instead: what the rest of fn finds there has to stay.
#pragma once

#include <ATen/core/Tensor.h>

namespace reprise {

// How many contexts of autocast this thread is in.
int autocast_nesting();
// Makes it so, without what entering and leaving them does.
void set_autocast_nesting(int depth);

// The same object as long as the cache has not been emptied, which is as long as one
// outermost context lasts. It is kept by whoever compares, so that its address is not
// used again. Undefined where autocast of the CPU casts to float32.
at::Tensor mark_of_cast_cache();

void empty_cast_cache();

}  // namespace reprise
