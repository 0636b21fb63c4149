/* AliOS Things, as far as hal_template.c uses it; fake_aos.c has the functions. */
#ifndef FAKE_AOS_KERNEL_H
#define FAKE_AOS_KERNEL_H

void *aos_malloc(unsigned int size);
void aos_free(void *memory);
void aos_msleep(int ms);
long long aos_now_ms(void);

#endif
