// The table of rules: a new rule is a line here. A rule's number is its place in the list.
#pragma once

#include "adam.hpp"
#include "gd.hpp"

namespace fusedstep {

template <class... Rules>
struct RuleList {
    static constexpr int count = sizeof...(Rules);
};

using Rules = RuleList<Gd, GdMomentum, Adam, AmsGrad>;

struct RuleStreams {
    int count;
    unsigned written;
};

template <class... All>
struct RuleStreamTable {
    RuleStreams rules[sizeof...(All)];
    constexpr RuleStreams operator[](int rule) const { return rules[rule]; }
};

template <class... All>
constexpr RuleStreamTable<All...> streams_of(RuleList<All...>) {
    return {{{All::streams, All::written}...}};
}

// The streams of each rule, by its number.
constexpr auto rule_streams = streams_of(Rules{});

constexpr int max_streams = 5;

template <class Rule, class... Others>
constexpr int index_in(RuleList<Others...>) {
    int index = 0;
    bool found = false;
    ((found = found || __is_same(Rule, Others), index += !found), ...);
    return index;
}

template <class Rule>
constexpr int rule_index = index_in<Rule>(Rules{});

}  // namespace fusedstep
