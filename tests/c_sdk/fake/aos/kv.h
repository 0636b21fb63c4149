#ifndef FAKE_AOS_KV_H
#define FAKE_AOS_KV_H

int aos_kv_set(const char *key, const void *value, int length, int sync);
int aos_kv_get(const char *key, void *buffer, int *length);

#endif
