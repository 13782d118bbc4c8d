/* Read what is to be done from a file, train the members on two threads, and write every array to another.

   For each field of Work the file has -1 and a number, or the size of an array (0: NULL) and its bytes. */

#include <pthread.h>
#include <stdio.h>

#ifndef MEMBERS /* what trains them, where it is there already */
#include "members.c"
#endif

enum { FIELDS = sizeof(Work) / 8 };

static Work work;
static int64_t next;
static int32_t stop;

static void *train(void *failed) {
    *(int *)failed |= train_members(&work, &next, &stop);
    return 0;
}

int main(int count, char **words) {
    int64_t sizes[FIELDS], *fields = (int64_t *)&work;
    FILE *in = fopen(words[1], "rb"), *out = fopen(words[count - 1], "wb");
    for (int i = 0; i < FIELDS; i++) {
        if (fread(&sizes[i], 8, 1, in) != 1) return 2;
        if (sizes[i] > 0) fields[i] = (int64_t)malloc(sizes[i]);
        void *to = sizes[i] > 0 ? (void *)fields[i] : &fields[i];
        if (sizes[i] && fread(to, sizes[i] > 0 ? sizes[i] : 8, 1, in) != 1) return 2;
    }
    pthread_t threads[2];
    int failed[2] = {0, 0};
    for (int i = 0; i < 2; i++) pthread_create(&threads[i], 0, train, &failed[i]);
    for (int i = 0; i < 2; i++) pthread_join(threads[i], 0);
    for (int i = 0; i < FIELDS; i++)
        if (sizes[i] > 0) fwrite((void *)fields[i], sizes[i], 1, out), free((void *)fields[i]);
    fclose(in), fclose(out);
    return failed[0] || failed[1];
}
