// A thread's own object of a class that has to be made and destroyed.
//
// A thread_local variable of such a class is looked up two to four times where it is used, by
// calls of __tls_get_addr, for the compiler asks each time whether it is made. Here it is once.
#pragma once

namespace reprise {

// One for each thread and `Tag`; made when it is first asked for. At its very end, when its own is
// destroyed already, a thread gets another one, which nobody destroys.
template <typename T, typename Tag = T>
T& per_thread() {
  static thread_local constinit T* t_known = nullptr;
  static thread_local constinit bool t_is_over = false;
  if (T* known = t_known) [[likely]] {
    return *known;
  }
  if (t_is_over) {
    t_known = new T{};
    return *t_known;
  }
  struct Owner {
    T object{};
    ~Owner() {
      t_known = nullptr;
      t_is_over = true;
    }
  };
  static thread_local Owner owner;
  t_known = &owner.object;
  return owner.object;
}

}  // namespace reprise
