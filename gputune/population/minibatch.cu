// The rows of a minibatch and their shares in its loss, for all members, in one launch. The definition is batches.py, whose
// operations are eleven launches. A thread an entry of ``rows`` (3, F, T, B), where T is 1 or the number of trials.
//   order    (3, all folds, length): of each fold, where its rows are in the weights, in the inputs and in the target
//   taken    (all folds, T): batch sizes;  counted (all folds): training rows;  weights (all folds, n), or none

extern "C" __global__ void minibatch(
    int folds, int trials, int width, int begin_fold, int all_folds, int length, int n, int shares, int weighted,
    const long long* step, const long long* order, const long long* taken, const double* counted,
    const double* weights, long long* rows, real* share)
{
    const long long entries = (long long)folds * trials * width, stride = (long long)blockDim.x * gridDim.x;
    for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < entries; i += stride) {
        const long long b = i % width, fold = begin_fold + i / width / trials, last = length - 1;
        const long long size = taken[fold * trials + i / width % trials], begin = *step * size;
        const long long* places = order + fold * length;
        for (long long k = 0; k < 3; k++)
            rows[k * entries + i] = places[k * all_folds * length + (begin + b < last ? begin + b : last)];
        if (!shares) continue;
        const double left = counted[fold] - begin, count = left < 0 ? 0 : left > size ? (double)size : left;
        const double* of_row = weights + fold * n;
        double total = weighted ? 0 : count;
        for (long long j = 0; weighted && j < count; j++) total += of_row[places[begin + j]];
        const double own = b >= count ? 0 : weighted ? of_row[places[begin + b]] : 1;
        share[i] = (real)(own > 0 ? own / total : 0);
    }
}
