#include "bindings/frames.h"

#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030C0000
#define REPRISE_FRAMES 1
#define Py_BUILD_CORE 1
#include <internal/pycore_frame.h>
#undef Py_BUILD_CORE
#else
#define REPRISE_FRAMES 0
#endif

int reprise_frames_supported(void) { return REPRISE_FRAMES; }

const void* reprise_next_frame(const void* frame, PyCodeObject** code, int* instruction) {
#if REPRISE_FRAMES
  const _PyInterpreterFrame* next = NULL;
  if (frame == NULL) {
    PyThreadState* thread = PyGILState_GetThisThreadState();
    if (thread == NULL || thread->cframe == NULL) {
      return NULL;
    }
    next = thread->cframe->current_frame;
  } else {
    next = ((const _PyInterpreterFrame*)frame)->previous;
  }
  if (next == NULL) {
    return NULL;
  }
  *code = next->f_code;
  *instruction = _PyInterpreterFrame_LASTI(next) * (int)sizeof(_Py_CODEUNIT);
  return next;
#else
  (void)frame;
  (void)code;
  (void)instruction;
  return NULL;
#endif
}
