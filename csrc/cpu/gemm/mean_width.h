// By what an engine is chosen beside rows.
#pragma once

#include <cstdint>

namespace mtlk {

// How wide products are: what all have together to multiply and add for a row, over the means of their inputs and
// outputs, which is what an engine has to convert. That of square ones is their width.
class MeanWidth {
 public:
  void add(int64_t inputs, int64_t outputs) {
    products_ += 2 * inputs * outputs;
    features_ += inputs + outputs;
  }
  int64_t operator()() const { return features_ == 0 ? 0 : products_ / features_; }

 private:
  int64_t products_ = 0, features_ = 0;
};

}  // namespace mtlk
