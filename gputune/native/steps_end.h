/* After the steps: takes ``count`` of them, each with the numbers that it reads. */
void take_steps(int64_t count, const int64_t *which, char **M, char *A, const double *const *S) {
    for (int64_t i = 0; i < count; i++) STEPS[which[i]](M, A, S[i]);
}
