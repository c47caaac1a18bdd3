// Reading and writing private members of torch's classes, where no accessor will do.
//
// The arguments of an explicit instantiation may name private members; what is made of
// them here is what the friend function returns:
//
//   REPRISE_OPEN_MEMBER(EngineOfGenerator, at::CPUGeneratorImpl, engine_, at::mt19937)
//   at::mt19937& engine = generator.*member_of(EngineOfGenerator());
//
// A torch that renames the member or changes its type does not compile. In .cpp files
// only, in an anonymous namespace.
#pragma once

// The type comes last: it may have commas in it. A template for each member, since it
// must be instantiated in the namespace that it is in.
#define REPRISE_OPEN_MEMBER(Tag, Class, member, ...)      \
  struct Tag {                                            \
    using Pointer = __VA_ARGS__ Class::*;                 \
    friend Pointer member_of(Tag);                        \
  };                                                      \
  template <Tag::Pointer Member>                          \
  struct Opens##Tag {                                     \
    friend Tag::Pointer member_of(Tag) { return Member; } \
  };                                                      \
  template struct Opens##Tag<&Class::member>;
